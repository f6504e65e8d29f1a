"""A row of a fault table: a job in which something goes wrong in one phase, run to its end, and what is left of it."""

import os
import time
from pathlib import Path
from typing import NamedTuple

from tests.mpi import jobs
from tests.mpi.mpirun import error_lines
from worker.checkpoint import list_checkpoints, read_checkpoint

LAUNCHER_SECONDS = 30.0  # to start and to end a few ranks and servers, on a machine that others use too
STEPS_AN_EPOCH = 5
PROGRAM = Path(__file__).parent / "programs" / "faulty_phase.py"

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


class Row(NamedTuple):
    """What came of it."""

    code: int
    said: str
    seconds: float
    output: Path
    started: int  # ranks
    running: list[str]  # those that still do

    @property
    def errors(self) -> list[str]:
        """The lines that say why it ended."""
        return error_lines(self.said)

    @property
    def checkpoints(self) -> list[int]:
        """The step of each that can be read."""
        return [read_checkpoint(path).step for path in list_checkpoints(self.output / "checkpoints")]


def run_row(
    run_ranks, folder: Path, fault: tuple[str, str, int], ranks: int, limits: tuple[float, float], sync: object
) -> Row:
    """Put `fault` (what, phase, rank) into a small job of `sync`.

    `limits`: its stall limit, and the seconds it may take beyond what a launcher needs.
    """
    stall_seconds, more_seconds = limits
    job = jobs.write_job(
        folder, jobs.write_data(folder / "data.npz"), limits={"stall_seconds": stall_seconds}, sync=sync
    )
    processes = folder / "processes"
    processes.mkdir()
    began = time.monotonic()
    done = run_ranks(
        ranks,
        [PROGRAM, *fault, processes, "train", job, "-o", folder / "out"],
        timeout_seconds=more_seconds + LAUNCHER_SECONDS,
    )
    seconds = time.monotonic() - began
    said = done.stdout + done.stderr
    started = [path.read_text() for path in processes.iterdir()]
    assert "Traceback" not in said
    return Row(done.returncode, said, seconds, folder / "out", len(started), [p for p in started if _runs(p)])


def _runs(process: str) -> bool:
    return os.path.exists(f"/proc/{process}") and "faulty_phase" in Path(f"/proc/{process}/cmdline").read_text()
