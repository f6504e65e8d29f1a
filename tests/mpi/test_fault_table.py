"""The fault table of all-reduce: a rank of three raises, is killed or is stopped, in each phase of a step and beyond.

Every row ends within the stall limit and the seconds a launcher takes, with one line that names the rank at fault, its
host, step and phase; the checkpoint of the epoch before stays readable, and no process is left. Print the table with

    python -m pytest tests/mpi/test_fault_table.py -rP -q | grep '^row'
"""

import os
import socket
import time
from pathlib import Path

import pytest

from tests.mpi import jobs
from worker.checkpoint import list_checkpoints, read_checkpoint

RANKS = 3
STALL_SECONDS = 1.0
LAUNCHER_SECONDS = 15.0  # to start and to end three ranks, on a machine that others use too
PROGRAM = Path(__file__).parent / "programs" / "faulty_phase.py"
STEPS_AN_EPOCH = 5

# Which rank is at fault: in a checkpoint the one that writes it. And the step in which it is.
PHASES = {
    "data": (1, STEPS_AN_EPOCH + 1),
    "forward": (1, STEPS_AN_EPOCH + 1),
    "backward": (0, STEPS_AN_EPOCH + 1),
    "exchange": (1, STEPS_AN_EPOCH + 1),
    "update": (2, STEPS_AN_EPOCH + 1),
    "evaluate": (1, 2 * STEPS_AN_EPOCH),
    "checkpoint": (0, 2 * STEPS_AN_EPOCH),
}
# What is said behind the place.
OUTCOMES = {
    "raise": "internal error: ValueError: out of cheese",
    "kill": "killed by a signal",
    "stop": "no progress for",
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("outcome", OUTCOMES)
def test_a_fault_in_a_phase_ends_the_job_and_is_named(run_ranks, tmp_path, outcome, phase) -> None:
    rank, step = PHASES[phase]
    job = jobs.write_job(tmp_path, jobs.write_data(tmp_path / "data.npz"), limits={"stall_seconds": STALL_SECONDS})
    processes = tmp_path / "processes"
    processes.mkdir()
    began = time.monotonic()
    done = run_ranks(
        RANKS,
        [PROGRAM, outcome, phase, rank, processes, "train", job, "-o", tmp_path / "out"],
        timeout_seconds=STALL_SECONDS + LAUNCHER_SECONDS,
    )
    seconds = time.monotonic() - began

    said = (done.stdout + done.stderr).replace("\0", "")  # mpirun ends some of its messages with a NUL
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    print(f"row {outcome:6} {phase:10} {seconds:5.1f} s  {errors[0]}")
    assert done.returncode != 0
    assert f"rank {rank} of {RANKS} on {socket.gethostname()}: " in errors[0]
    assert f"step {step} (epoch 2), phase {phase}" in errors[0]
    assert OUTCOMES[outcome] in errors[0]
    assert "Traceback" not in said

    found = [read_checkpoint(path).step for path in list_checkpoints(tmp_path / "out" / "checkpoints")]
    # mpirun lets a stopped rank run on before it ends it: then the second checkpoint may become complete.
    assert found == [STEPS_AN_EPOCH] or (outcome, found) == ("stop", [STEPS_AN_EPOCH, 2 * STEPS_AN_EPOCH])
    started = sorted(processes.iterdir())
    assert len(started) == RANKS
    assert [process for path in started if _runs(process := path.read_text())] == []


def test_without_shared_memory_the_ranks_that_may_be_late_are_named(run_ranks, tmp_path) -> None:
    limits = {"stall_seconds": STALL_SECONDS}
    sync = {"all_reduce": {"shared_memory": False}}
    job = jobs.write_job(tmp_path, jobs.write_data(tmp_path / "data.npz"), limits=limits, sync=sync)
    processes = tmp_path / "processes"
    processes.mkdir()
    done = run_ranks(RANKS, [PROGRAM, "stop", "forward", 2, processes, "train", job, "-o", tmp_path / "out"])
    host = socket.gethostname()
    waits = f"error: rank 0 of {RANKS} on {host}: no progress for 1 s in step 6 (epoch 2), phase exchange; "
    assert f"{waits}waits for rank 1, 2 on {host}: " in done.stderr
    assert "Traceback" not in done.stderr


def _runs(process: str) -> bool:
    return os.path.exists(f"/proc/{process}") and "faulty_phase" in Path(f"/proc/{process}/cmdline").read_text()
