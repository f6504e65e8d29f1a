"""Shows a job's progress: a live bar on a terminal, plain lines in a pipe, JSON lines for programs.

Rules: the three take the same events, so a verb never asks which one it has. Plain lines are thinned by what the
reports say and not by the clock, so the same job prints the same lines.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TextIO

from coordinator.presentation import document, duration, json_line, number, printable
from protos import job_pb2

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

LINES_AT_LEAST_SECONDS = 5.0  # of training time between two plain lines, unless an epoch ends
TRAINING = (("loss", "loss"), ("accuracy", "accuracy"))
VALIDATION = (("validation_loss", "val loss"), ("validation_accuracy", "val accuracy"))
BAR_AT_LEAST = 4  # columns of a narrow terminal
EPOCH_LINES = 20  # about as many epochs of a long job get their line


class Display(Protocol):
    """Where progress goes. Entered before the first event and left after the last."""

    def state(self, words: str, job: job_pb2.Job | None = None) -> None: ...
    def note(self, line: str) -> None: ...
    def report(self, report: job_pb2.Report) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


# ------------------------------------------------------------------------------------------------------- what is said


def report_line(report: job_pb2.Report, epochs: int) -> str:
    """One report in words, such as `epoch 1/3  step 235/705  loss 0.5123  accuracy 0.8120  51,234 samples/s`."""
    where = [f"epoch {report.epoch}/{epochs}", f"step {report.step}/{report.total_steps}"]
    said = [*where, *_figures(report, TRAINING), speed(report), *_figures(report, VALIDATION), *metric_figures(report)]
    return "  ".join(said)


def epoch_line(report: job_pb2.Report, epochs: int) -> str:
    """The same above a live bar, which has the rest: 80 columns hold it where no metrics were asked for."""
    where = f"epoch {report.epoch:{len(str(epochs))}}/{epochs}"
    return "  ".join([where, *_figures(report, (*TRAINING, *VALIDATION)), *metric_figures(report)])


def speed(report: job_pb2.Report) -> str:
    return f"{report.samples_per_second:,.0f} samples/s"


def _figures(report: job_pb2.Report, named: Sequence[tuple[str, str]]) -> list[str]:
    return [f"{words} {number(getattr(report, field))}" for field, words in named if report.HasField(field)]


def metric_figures(report: job_pb2.Report) -> list[str]:
    """The metrics that are one number each, by name; lists and matrices are for `metrics.jsonl`."""
    fields = sorted(report.validation_metrics.fields.items())
    numbers = ((name, value.number_value) for name, value in fields if value.HasField("number_value"))
    return [f"{printable(name.replace('_', ' '))} {number(value)}" for name, value in numbers]


def seconds_left(report: job_pb2.Report) -> float | None:
    """Time to the last step at the present speed; None before there is one."""
    if report.step <= 0 or report.samples_per_second <= 0 or report.total_steps < report.step:
        return None
    samples_each_step = report.samples / report.step
    return (report.total_steps - report.step) * samples_each_step / report.samples_per_second


def ends_epoch(report: job_pb2.Report, epochs: int) -> bool:
    return report.total_steps > 0 and report.step * epochs % report.total_steps == 0


class Thinning:
    """Which reports get a line: the end of each epoch, or of every few in a long job; between them one now and then."""

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs
        self._every = max(1, round(epochs / EPOCH_LINES))
        self._said_at_seconds = -LINES_AT_LEAST_SECONDS  # the first report is news

    def wants(self, report: job_pb2.Report) -> bool:
        last = 0 < report.total_steps <= report.step
        due = report.wall_seconds - self._said_at_seconds >= LINES_AT_LEAST_SECONDS
        # Where the epochs are so many, waiting for the next chosen one may take long: the clock decides too.
        chosen = ends_epoch(report, self._epochs) and (report.epoch % self._every == 0 or due)
        wanted = last or chosen or due
        if wanted:
            self._said_at_seconds = report.wall_seconds
        return wanted


# ------------------------------------------------------------------------------------------------------- where it goes


class PlainLines:
    """For pipes and files: a line a change of state, a line an epoch."""

    def __init__(self, out: TextIO, epochs: int) -> None:
        self._out = out
        self._epochs = epochs
        self._thinning = Thinning(epochs)
        self._words = ""

    def state(self, words: str, job: job_pb2.Job | None = None) -> None:
        if words != self._words:
            self._words = words
            print(words, file=self._out, flush=True)

    def note(self, line: str) -> None:
        print(line, file=self._out, flush=True)

    def report(self, report: job_pb2.Report) -> None:
        if self._thinning.wants(report):
            print(report_line(report, self._epochs), file=self._out, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._out.flush()


class JsonLines:
    """For programs: every event, one object a line, `{"job": ...}`, `{"report": ...}` or `{"note": ...}`."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def state(self, words: str, job: job_pb2.Job | None = None) -> None:
        if job is not None:
            print(json_line({"job": document(job)}), file=self._out, flush=True)

    def note(self, line: str) -> None:
        print(json_line({"note": line}), file=self._out, flush=True)

    def report(self, report: job_pb2.Report) -> None:
        print(json_line({"report": document(report)}), file=self._out, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._out.flush()


class LiveBar:
    """For people at a terminal: one bar that moves, and above it a line for each epoch."""

    def __init__(self, console: Console, epochs: int) -> None:
        self._console = console
        self._epochs = epochs
        self._thinning = Thinning(epochs)
        self._progress = _make_progress(console)
        self._task = self._progress.add_task("starting", total=None, figures="", left="")

    def state(self, words: str, job: job_pb2.Job | None = None) -> None:
        self._progress.update(self._task, description=words)

    def note(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False)

    def report(self, report: job_pb2.Report) -> None:
        if self._thinning.wants(report) and ends_epoch(report, self._epochs):
            self._console.print(epoch_line(report, self._epochs), markup=False, highlight=False)
        where = f"epoch {report.epoch}/{self._epochs}"
        seconds = seconds_left(report)
        left = f"{duration(seconds)} left" if seconds is not None else ""
        room = self._console.width - len(where) - len(left) - BAR_AT_LEAST - 3  # a blank between the columns
        self._progress.update(
            self._task,
            description=where,
            total=report.total_steps or None,
            completed=report.step,
            figures=_fitting([*_figures(report, TRAINING), speed(report)], room),
            left=left,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def _fitting(figures: Sequence[str], room: int) -> str:
    """As many of them, from the first on, as the room holds."""
    line = ""
    for figure in figures:
        longer = f"{line}  {figure}" if line else figure
        if len(longer) > room:
            break
        line = longer
    return line


def _make_progress(console: Console) -> Progress:
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    def text(template: str) -> TextColumn:
        return TextColumn(template, markup=False, table_column=Column(no_wrap=True))

    return Progress(
        text("{task.description}"),
        BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=BAR_AT_LEAST)),
        text("{task.fields[figures]}"),
        text("{task.fields[left]}"),
        console=console,
        transient=True,
        expand=True,
    )


def open_display(as_json: bool, epochs: int, out: TextIO | None = None) -> Display:
    """The display that fits where the output goes."""
    out = sys.stdout if out is None else out
    if as_json:
        return JsonLines(out)
    if not out.isatty():
        return PlainLines(out, epochs)
    from rich.console import Console

    console = Console(file=out)
    # A terminal that cannot move its cursor gets lines too.
    return LiveBar(console, epochs) if console.is_terminal and not console.is_dumb_terminal else PlainLines(out, epochs)
