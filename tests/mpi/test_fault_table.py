"""The fault table of the all-reduce: a rank that raises, is killed or stands still, in each phase of a step.

Every row ends within the limit, names rank, host, step and phase in one line, keeps the last checkpoint, and leaves no
process. `python -m tests.mpi.test_fault_table` prints the table with the seconds each row took.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.mpi.conftest import command_line
from tests.mpi.jobs import write_data, write_job
from tests.mpi.mpirun import ENVIRONMENT, PROJECT
from worker.checkpoint import newest_checkpoint

PROGRAM = Path(__file__).parent / "programs" / "faulty_rank.py"
RANKS, VICTIM = 3, 1
STEPS_AN_EPOCH = 5
STEP = 2 * STEPS_AN_EPOCH + 2  # in the third epoch; what comes at an epoch's end comes at step 15
STALL_SECONDS = 2.0
ENDS_WITHIN_SECONDS = 15.0  # start-up, the limit and mpirun's own patience on a busy machine
PHASES = ("the data", "forward", "backward", "the exchange", "the update", "the evaluation", "the checkpoint")
FAULTS = {
    "raises": r"error: rank 1 of 3 on \S+: in {phase} of step {step}: internal error: ValueError: out of cheese",
    "killed": r"error: rank 0 of 3 on \S+: rank 1 \(process \d+\), in {phase} of step {step} for \S+ s, is gone",
    "stopped": r"error: rank [02] of 3 on \S+: no progress for \d+ s while .*: "
    r"rank 1 \(process \d+\), in {phase} of step {step} for \S+ s, is stopped \(\S+\); or limits.stall_seconds",
}


class Outcome(NamedTuple):
    """What became of a run."""

    exit_code: int
    errors: str
    seconds: float
    output: Path
    launcher: int


def expected_step(phase: str) -> int:
    """At which step the fault comes."""
    return 3 * STEPS_AN_EPOCH if phase in ("the evaluation", "the checkpoint") else STEP


def provoke(phase: str, fault: str, folder: Path) -> Outcome:
    """One row."""
    job = write_job(folder, write_data(folder / "toy.npz"), limits={"stall_seconds": STALL_SECONDS})
    output = folder / "out"
    words = [PROGRAM, phase, fault, VICTIM, STEP, "train", job, "-o", output]
    began = time.monotonic()
    run = subprocess.Popen(
        command_line(RANKS, words), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(PROJECT)},
    )  # fmt: skip
    try:
        _, errors = run.communicate(timeout=ENDS_WITHIN_SECONDS)
    finally:
        if run.poll() is None:
            run.kill()
            run.communicate(timeout=10)
    return Outcome(run.returncode, errors, time.monotonic() - began, output, run.pid)


def left_behind(outcome: Outcome) -> list[str]:
    """Processes that still work on the run's output folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().decode(errors="replace")
        except OSError:
            continue  # it ended while we looked
        if str(outcome.output) in words and int(entry.parent.name) != os.getpid():
            found.append(words)
    return found


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("phase", PHASES)
def test_a_rank_that_fails_ends_the_run_and_is_named_with_step_and_phase(tmp_path, phase, fault) -> None:
    outcome = provoke(phase, fault, tmp_path)
    assert outcome.exit_code != 0
    pattern = FAULTS[fault].format(phase=phase, step=expected_step(phase))
    assert re.search(f"^ *{pattern}", outcome.errors, re.MULTILINE), outcome.errors
    assert "Traceback" not in outcome.errors
    assert len(re.findall("^ *error: ", outcome.errors, re.MULTILINE)) <= (2 if fault == "stopped" else 1), (
        outcome.errors
    )
    assert newest_checkpoint(outcome.output / "checkpoints", print).step >= 2 * STEPS_AN_EPOCH
    deadline = time.monotonic() + 5
    while left := left_behind(outcome):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def main() -> None:
    """Print the table."""
    print(f"{'phase':<16} {'a rank':<8} {'seconds':>7}  what the run says")
    for phase in PHASES:
        for fault in FAULTS:
            with tempfile.TemporaryDirectory() as folder:
                outcome = provoke(phase, fault, Path(folder))
            said = [line for line in outcome.errors.splitlines() if line.startswith("error: ")]
            print(f"{phase:<16} {fault:<8} {outcome.seconds:7.1f}  {said[0] if said else 'nothing'}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
