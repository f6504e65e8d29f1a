"""Progress as a live bar, as plain lines and as JSON lines."""

from __future__ import annotations

import io
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from coordinator.presentation import duration, number, printable
from coordinator.progress import (
    EPOCH_LINES,
    JsonLines,
    LiveBar,
    PlainLines,
    Thinning,
    epoch_line,
    open_display,
    report_line,
    seconds_left,
)
from protos import job_pb2


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def report(step: int, total: int, epoch: int, seconds: float, **values: float) -> job_pb2.Report:
    return job_pb2.Report(
        step=step,
        epoch=epoch,
        samples=32 * step,
        total_steps=total,
        wall_seconds=seconds,
        samples_per_second=320,
        **values,
    )


def shown(text: str) -> str:
    """Without the terminal's commands."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_report_says_what_it_has_and_no_more():
    assert report_line(report(5, 10, 1, 1.0, loss=0.5), 2) == "epoch 1/2  step 5/10  loss 0.5000  320 samples/s"


def test_metrics_of_one_number_end_the_line_of_an_epoch():
    found = report(10, 10, 2, 1.0, loss=0.5)
    found.validation_metrics.update({"top_5_accuracy": 0.75, "f1": 0.5, "f1_per_class": [0.25, 0.75]})
    said = "loss 0.5000  320 samples/s  f1 0.5000  top 5 accuracy 0.7500"
    assert report_line(found, 2) == f"epoch 2/2  step 10/10  {said}"
    assert epoch_line(found, 2) == "epoch 2/2  loss 0.5000  f1 0.5000  top 5 accuracy 0.7500"


def test_time_left_follows_from_the_present_speed():
    assert seconds_left(report(40, 100, 1, 1.0)) == pytest.approx(6.0)
    assert seconds_left(report(100, 100, 1, 1.0)) == 0.0
    assert seconds_left(job_pb2.Report(step=3, total_steps=9)) is None


def test_every_epoch_of_a_short_job_gets_its_line():
    thinning = Thinning(epochs=3)
    assert [thinning.wants(report(step, 9, 1 + (step - 1) // 3, 5.0 + step / 100)) for step in range(1, 10)] == [
        True, False, True, False, False, True, False, False, True,
    ]  # fmt: skip


@given(epochs=st.integers(1, 3000), steps=st.integers(1, 5), seconds=st.floats(0.01, 2000))
def test_a_pipe_is_not_flooded_and_always_gets_the_last_report(epochs, steps, seconds):
    thinning, total = Thinning(epochs), epochs * steps
    wanted = [
        thinning.wants(report(step, total, -(-step // steps), seconds * step / total)) for step in range(1, total + 1)
    ]
    assert wanted[-1]
    assert sum(wanted) <= 2 * EPOCH_LINES + seconds / 5.0 + 2


def test_a_pipe_gets_each_state_once():
    out = io.StringIO()
    with PlainLines(out, 3) as display:
        for words in ("waiting", "waiting", "running"):
            display.state(words)
    assert out.getvalue() == "waiting\nrunning\n"


def test_json_lines_are_one_object_each():
    out = io.StringIO()
    with JsonLines(out) as display:
        display.state("words are for people")
        display.report(report(1, 2, 1, 0.5, loss=float("inf")))
    (line,) = out.getvalue().splitlines()
    assert "loss" not in json.loads(line)["report"]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_terminal_gets_a_bar_that_fits_its_width(width):
    out = Terminal()
    console = Console(file=out, width=width, force_terminal=True, legacy_windows=False, _environ={"TERM": "xterm"})
    with LiveBar(console, 30) as display:
        display.state("digits: starting 2 workers")
        display._progress.refresh()
        display.report(report(20, 300, 2, 1.0, loss=0.512345, accuracy=0.75))
        display._progress.refresh()
    lines = re.split(r"[\r\n]", shown(out.getvalue()))
    assert all(len(line.rstrip()) <= width for line in lines if "samples/s" in line or "starting" in line)
    assert any(line.startswith("epoch 2/30") for line in lines)
    if width >= 80:
        assert any("loss 0.5123  accuracy 0.7500  320 samples/s 28 s left" in line for line in lines)


def test_a_terminal_keeps_a_line_for_each_epoch_above_the_bar():
    out = Terminal()
    console = Console(file=out, width=80, force_terminal=True, _environ={"TERM": "xterm"})
    with LiveBar(console, 3) as display:
        for epoch in (1, 2, 3):
            display.report(
                report(10 * epoch, 30, epoch, epoch, loss=1 / epoch, validation_loss=0.5, validation_accuracy=0.9)
            )
    kept = [line.strip() for line in shown(out.getvalue()).splitlines() if "val accuracy" in line]
    assert [line[line.index("epoch") :] for line in kept] == [
        "epoch 1/3  loss 1.0000  val loss 0.5000  val accuracy 0.9000",
        "epoch 2/3  loss 0.5000  val loss 0.5000  val accuracy 0.9000",
        "epoch 3/3  loss 0.3333  val loss 0.5000  val accuracy 0.9000",
    ]


def test_the_display_follows_from_where_the_output_goes(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert isinstance(open_display(False, 3, io.StringIO()), PlainLines)
    assert isinstance(open_display(False, 3, Terminal()), LiveBar)
    assert isinstance(open_display(True, 3, Terminal()), JsonLines)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(open_display(False, 3, Terminal()), PlainLines)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
        (97200, "1 d 3 h"),
    ],
)
def test_durations_read_naturally(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.0000"), (0.51234, "0.5123"), (0.00012, "1.200e-04"), (123456.0, "1.235e+05"), (float("nan"), "nan")],
)
def test_numbers_keep_the_digits_that_say_something(value, text):
    assert number(value) == text


@given(st.text())
def test_no_text_commands_the_terminal(text):
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", printable(text))
