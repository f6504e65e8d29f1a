"""The table of the slow network, of invented runs; what a run has reported so far; the jobs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.measurement import BenchmarkFailed
from tests.benchmarks.slow_network import (
    CHOICES,
    FLOAT32,
    Epochs,
    Replay,
    Trained,
    make_job,
    network_table,
    read_epochs,
    train,
)
from worker.__main__ import read_job

SIGN, TOP_K = "all-reduce, sign", "all-reduce, top_k 10 %"


def test_what_misses_the_target_with_a_seed_has_no_time_and_points_are_lost_within_seeds() -> None:
    found = {
        FLOAT32: Trained([[0.80, 0.85], [0.84, 0.86]], 10.0),
        SIGN: Trained([[0.85, 0.85], [0.80, 0.84]], 0.5),
        TOP_K: Trained([[0.80, 0.83], [0.70, 0.85]], 0.5),
    }
    base, sign, top_k = network_table(CHOICES, found, 0.84).rows
    assert base[2:] == ("10.00", "15.0 [10.0 .. 20.0]", "1.0", "85.50 [85.00 .. 86.00]", "")
    assert sign[2:] == ("0.50", "0.8 [0.5 .. 1.0]", "25.0 [10.0 .. 40.0]", "84.50 [84.00 .. 85.00]", "+1.00 ± 1.00")
    assert top_k[3:] == ("-", "-", "84.00 [83.00 .. 85.00]", "+1.50 ± 0.50")


def test_one_seed_has_no_error_and_a_target_nobody_reaches_no_time() -> None:
    found = {FLOAT32: Trained([[0.80]], 10.0), SIGN: Trained([[0.79]], 0.5)}
    assert [row[3:] for row in network_table(CHOICES, found, 0.9).rows] == [
        ("-", "-", "80.00", ""),
        ("-", "-", "79.00", "+1.00"),
    ]


def test_the_epochs_so_far_are_read_without_the_line_that_is_being_written(tmp_path: Path) -> None:
    assert read_epochs(tmp_path) == []
    lines = [
        {"wall_seconds": 1.0, "loss": 2.0},
        {"wall_seconds": 2.0, "validation_accuracy": 0.5},
        {"wall_seconds": 3.0, "validation_accuracy": 0.83},
    ]
    text = "\n".join(map(json.dumps, lines))
    (tmp_path / "metrics.jsonl").write_text(text)
    assert read_epochs(tmp_path) == [(2.0, 0.5)]
    (tmp_path / "metrics.jsonl").write_text(text + "\n")
    assert read_epochs(tmp_path) == [(2.0, 0.5), (3.0, 0.83)]


class Invented:
    """Stands for hosts: starts a program that writes what a run would."""

    def __init__(self, program: str) -> None:
        self._program = program

    def start(self, _ranks: object, argv: list[object]) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", self._program, str(argv[-1])]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


WRITES_TWO_EPOCHS = """
import os, sys, time
os.mkdir(sys.argv[1])
with open(sys.argv[1] + "/metrics.jsonl", "w") as file:
    file.write('{"wall_seconds": 1.0, "validation_accuracy": 0.5}\\n')
    file.write('{"wall_seconds": 2.0, "validation_accuracy": 0.9}\\n')
"""


def test_enough_is_the_target_or_so_many_epochs() -> None:
    below: Epochs = [(1.0, 0.5)]
    reached: Epochs = [*below, (2.0, 0.9)]
    assert [Replay({}, target=0.9).enough(epochs) for epochs in ([], below, reached)] == [False, False, True]
    assert [Replay({}, slow_epochs=1).enough(epochs) for epochs in ([], below, reached)] == [False, True, True]


def test_a_run_that_has_told_enough_is_ended_there(tmp_path: Path) -> None:
    hosts = Invented(WRITES_TWO_EPOCHS + "time.sleep(300)")
    assert train(hosts, {}, Replay({}, target=0.9).enough, tmp_path) == [(1.0, 0.5), (2.0, 0.9)]


def test_a_run_that_does_not_is_read_when_it_has_ended(tmp_path: Path) -> None:
    hosts = Invented(WRITES_TWO_EPOCHS)
    assert train(hosts, {}, Replay({}, target=0.95).enough, tmp_path) == [(1.0, 0.5), (2.0, 0.9)]


def test_a_run_that_fails_says_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkFailed, match="exited with 1: no link"):
        train(Invented("import sys; sys.exit('no link')"), {}, Replay({}).enough, tmp_path)


def test_every_choice_is_a_job_that_the_rules_allow_and_every_wire_format_is_there(tmp_path: Path) -> None:
    reduced, served = set(), set()
    for name, choice in CHOICES.items():
        job = tmp_path / "job.json"
        job.write_text(json.dumps(make_job(choice, 1, tmp_path)))
        sync = read_job(job).sync
        assert sync.WhichOneof("kind"), name
        reduced.add(sync.all_reduce.wire_format.WhichOneof("kind"))
        served.add(sync.parameter_server.wire_format.WhichOneof("kind"))
    wire_format = sync.all_reduce.DESCRIPTOR.fields_by_name["wire_format"].message_type
    formats = {field.name for field in wire_format.fields}
    assert formats <= reduced
    assert formats - {"power_sgd"} <= served  # whose factors are sums over all nodes
