"""A rank that dies, raises or stands still ends the job at once, and the line says what happened."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from tests.mpi.mpirun import error_lines

END_SECONDS = 20  # far less than the 60 s after which a stall would end it anyway


@pytest.fixture
def endless_job(tmp_path: Path) -> Path:
    """A job that would take days, with epochs long enough that nearly all its time is spent in steps."""
    random = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=random.standard_normal((100_000, 50)), y=random.integers(0, 3, 100_000))
    job = {
        "name": "endless",
        "data": {"train": {"npz": {"path": "data.npz"}}},
        "model": [{"dense": {"units": 64}}, "relu", {"dense": {"units": 3}}],
        "loss": "softmax_cross_entropy",
        "optimizer": "adam",
        "training": {"epochs": 10_000_000},
    }
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job))
    return path


def wait_for_training(output: Path) -> None:
    deadline = time.monotonic() + 30
    metrics = output / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size > 0):
        assert time.monotonic() < deadline, "no step was reported in 30 s"
        time.sleep(0.02)


def rank_process(launcher: subprocess.Popen[str], rank: int) -> int:
    """The process id of one rank below an mpirun."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it ended while we looked
        if parent == launcher.pid and f"OMPI_COMM_WORLD_RANK={rank}".encode() in variables:
            return int(entry.name)
    raise AssertionError(f"rank {rank} was not found below process {launcher.pid}")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_job_at_once(start_ranks, endless_job, tmp_path, rank) -> None:
    launcher = start_ranks(2, ["-m", "worker", "train", endless_job, "-o", tmp_path / "out"])
    wait_for_training(tmp_path / "out")
    os.kill(rank_process(launcher, rank), signal.SIGKILL)
    _, errors = launcher.communicate(timeout=END_SECONDS)
    assert launcher.returncode != 0
    assert f"rank {rank}" in errors
    assert "signal 9" in errors


@pytest.mark.parametrize("sync", ["all_reduce", "{local: {replica: rank, steps: 50}}"])
def test_a_rank_that_stands_still_ends_the_job_naming_step_and_limit(start_ranks, endless_job, tmp_path, sync) -> None:
    job = ["-m", "worker", "train", endless_job, "-o", tmp_path / "out", "--set", "limits.stall_seconds=2"]
    launcher = start_ranks(2, [*job, "--set", f"sync={sync}"])
    wait_for_training(tmp_path / "out")
    stopped = rank_process(launcher, 1)
    os.kill(stopped, signal.SIGSTOP)
    try:
        _, errors = launcher.communicate(timeout=END_SECONDS)
    finally:
        # mpirun kills its ranks, and SIGKILL ends a stopped process too; this only makes sure of it.
        if Path(f"/proc/{stopped}").exists():
            os.kill(stopped, signal.SIGKILL)
    assert launcher.returncode != 0
    said = r"error: rank 1 of 2 on \S+: no progress for \d+ s in step \d+ \(epoch \d+\), phase "
    assert any(re.match(said, line) for line in error_lines(errors)), errors
    assert "limits.stall_seconds (2)" in errors


def test_an_exception_on_one_rank_aborts_all_at_once(run_ranks, endless_job, tmp_path) -> None:
    program = tmp_path / "raises.py"
    program.write_text(
        "import sys\n"
        "from worker import __main__, train\n"
        "from worker.engine.model import Model\n"
        "forward = Model.forward\n"
        "calls = [0]\n"
        "def raising(self, *arguments):\n"
        "    calls[0] += 1\n"
        "    if calls[0] == 20 and __import__('mpi4py.MPI').MPI.COMM_WORLD.rank == 1:\n"
        "        raise ValueError('out of cheese')\n"
        "    return forward(self, *arguments)\n"
        "Model.forward = raising\n"
        "__main__.main()\n"
    )
    done = run_ranks(3, [program, "train", endless_job, "-o", tmp_path / "out"], timeout_seconds=END_SECONDS)
    assert done.returncode != 0
    assert "error: rank 1 of 3" in done.stderr
    assert "out of cheese" in done.stderr
    assert "Traceback" not in done.stderr


def test_killing_mpirun_leaves_no_rank_behind(start_ranks, endless_job, tmp_path) -> None:
    launcher = start_ranks(2, ["-m", "worker", "train", endless_job, "-o", tmp_path / "out"])
    wait_for_training(tmp_path / "out")
    ranks = [rank_process(launcher, 0), rank_process(launcher, 1)]
    launcher.kill()
    launcher.wait(timeout=END_SECONDS)
    deadline = time.monotonic() + END_SECONDS
    while left := [rank for rank in ranks if Path(f"/proc/{rank}").exists()]:
        assert time.monotonic() < deadline, f"processes {left} outlive their launcher"
        time.sleep(0.05)
