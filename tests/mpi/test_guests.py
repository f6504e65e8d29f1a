"""Guests of a job under mpirun, as processes: they come, go, are killed and stopped, and the job ends as it should."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.mpi.conftest import command_line
from tests.mpi.jobs import assert_close, summary, train, write_data, write_job
from tests.mpi.mpirun import ENVIRONMENT, PROJECT

STEPS = 600
TRAINING = {"epochs": STEPS // 5}
DEADLINE_SECONDS = 60
GENTLE = {"optimizer": "sgd"}


def servers(count: int, **settings: object) -> dict:
    return {"parameter_server": {"servers": count, "guests": True, **settings}}


class Program:
    """A process whose output goes to a file, so that a test can wait for a line of it."""

    def __init__(self, argv: list[str], log: Path) -> None:
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                argv, stdout=file, stderr=subprocess.STDOUT, env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(PROJECT)}
            )

    def wait_for(self, pattern: str) -> re.Match[str]:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not (found := re.search(pattern, self.log.read_text())):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.log.read_text()}"
            assert self.process.poll() is None, f"ended without {pattern!r}: {self.log.read_text()}"
            time.sleep(0.01)
        return found

    def end(self) -> str:
        """Wait for a good end; what it said."""
        assert self.process.wait(2 * DEADLINE_SECONDS) == 0, self.log.read_text()
        return self.log.read_text()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)


class Run:
    """A job and its guests. After its first epoch rank 0 stands still until `go`, so that guests are there in time."""

    def __init__(self, job: Path, folder: Path, ranks: int = 1) -> None:
        self.output = folder / "out"
        self.folder = folder
        self.programs: list[Program] = []
        argv = ["-m", "worker", "train", job, "-o", self.output]
        self.job = self.start(command_line(ranks, argv), "job")
        deadline = time.monotonic() + DEADLINE_SECONDS
        reports = self.output / "metrics.jsonl"
        while not (reports.exists() and reports.read_text()):
            assert time.monotonic() < deadline
            assert self.job.process.poll() is None, self.job.log.read_text()
            time.sleep(0.001)
        self.first_rank = rank_processes(self.job.process.pid)[0]
        os.kill(self.first_rank, signal.SIGSTOP)

    def start(self, argv: list[str], name: str) -> Program:
        self.programs.append(Program(argv, self.folder / f"{name}.log"))
        return self.programs[-1]

    def guest(self, name: str) -> Program:
        guest = self.start([sys.executable, "-m", "worker", "join", str(self.output)], name)
        guest.wait_for(r"joined as guest \d+")
        return guest

    def go(self) -> None:
        os.kill(self.first_rank, signal.SIGCONT)


def rank_processes(mpirun: int) -> list[int]:
    """Those that mpirun has started, the lowest first."""
    children = Path(f"/proc/{mpirun}/task/{mpirun}/children").read_text().split()
    return sorted(int(pid) for pid in children if b"train" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data.npz")


@pytest.fixture
def start() -> Iterator[Callable[..., Run]]:
    """start(job, folder): a run; what is left of it is killed."""
    runs: list[Run] = []

    def make(*arguments: object) -> Run:
        runs.append(Run(*arguments))
        return runs[-1]

    yield make
    for program in (program for run in runs for program in run.programs):
        if program.process.poll() is None:
            program.process.kill()
        program.process.wait(20)


@pytest.mark.parametrize("count", [1, 2])
def test_with_guests_that_stay_or_leave_the_weights_are_those_of_one_rank_alone(
    run_ranks, start, data, tmp_path, count
) -> None:
    reference = train(run_ranks, 1, write_job(tmp_path, data, training=TRAINING, **GENTLE), tmp_path / "alone")
    run = start(write_job(tmp_path, data, training=TRAINING, sync=servers(count), **GENTLE), tmp_path)
    stays, leaves = run.guest("stays"), run.guest("leaves")
    run.go()
    leaves.wait_for("taking part")
    leaves.signal(signal.SIGTERM)
    left_after, stayed = (int(re.search(r"(\d+) steps done here", program.end())[1]) for program in (leaves, stays))
    log = run.job.end()
    assert_close(load_file(run.output / "model.safetensors"), reference)
    assert 0 < left_after < stayed < STEPS
    assert log.count("has joined; it takes part from step") == 2
    assert "dropped" not in log
    told = summary(run.output)
    assert (told["steps"], told["samples"], told["exchange"]["guests"]) == (STEPS, 162 * TRAINING["epochs"], 2)
    assert (told["exchange"]["guests_dropped"], told["exchange"]["samples_missed"]) == (0, 0)
    assert not (run.output / "guests.json").exists()


@pytest.mark.parametrize("mode", ["synchronous", {"bounded_staleness": {"steps": 2}}])
def test_a_guest_killed_and_one_stopped_are_dropped_and_the_job_ends_well(start, data, tmp_path, mode) -> None:
    job = write_job(
        tmp_path, data, training=TRAINING, sync=servers(2, mode=mode), limits={"stall_seconds": 12}, **GENTLE
    )
    run = start(job, tmp_path)
    killed, stopped = run.guest("killed"), run.guest("stopped")
    run.go()
    for guest in (killed, stopped):
        guest.wait_for("taking part")
    killed.signal(signal.SIGKILL)
    stopped.signal(signal.SIGSTOP)
    run.job.wait_for(r"guest \d+ was dropped in step \d+: its stream ended")
    run.job.wait_for(r"guest \d+ was dropped in step \d+: it was silent for \d+\.\d s")
    log = run.job.end()
    assert log.count("was dropped") == 2
    told = summary(run.output)
    assert (told["steps"], told["exchange"]["guests_dropped"]) == (STEPS, 2)
    assert math.isfinite(told["train_loss"])
    assert math.isfinite(told["validation_loss"])


def test_a_follower_prints_what_the_job_itself_finds_and_ends_with_it(start, data, tmp_path) -> None:
    run = start(write_job(tmp_path, data, training=TRAINING, sync=servers(1)), tmp_path)
    argv = [sys.executable, "-m", "worker", "follow", str(run.output), "--format", "json", "--every", "5"]
    follower = run.start(argv, "follower")
    follower.wait_for("following")
    run.go()
    run.job.end()
    lines = [json.loads(line) for line in follower.end().splitlines() if line.startswith("{")]
    found = {line["step"]: line["validation_loss"] for line in lines}
    assert STEPS in found
    evaluations = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    expected = {line["step"]: line["validation_loss"] for line in evaluations if "validation_loss" in line}
    for step in found.keys() & expected.keys():
        assert found[step] == pytest.approx(expected[step], rel=1e-6)


def test_a_guest_loads_no_mpi(start, data, tmp_path) -> None:
    run = start(write_job(tmp_path, data, training=TRAINING, sync=servers(1)), tmp_path)
    program = (
        "import runpy, sys, signal\n"
        "sys.argv = ['paceline-worker', 'join', sys.argv[1]]\n"
        "try:\n    runpy.run_module('worker', run_name='__main__')\n"
        "finally:\n    print('mpi4py' in sys.modules)\n"
    )
    guest = run.start([sys.executable, "-c", program, str(run.output)], "guest")
    guest.wait_for("joined as guest")
    run.go()
    guest.wait_for("taking part")
    guest.signal(signal.SIGINT)
    assert guest.end().splitlines()[-1] == "False"
    run.job.end()
