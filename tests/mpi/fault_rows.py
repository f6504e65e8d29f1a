"""Rows of the fault table: jobs in which something goes wrong in one phase, run to their ends, and what they leave.

A row mostly waits: for Python to be loaded, for a limit to pass, for mpirun to end the others. So several run at a
time, while the tests look at them in their order.

Rules: what ranks say is read in their own logs: mpirun loses lines when it ends ranks, and puts bytes of its own
between them.
"""

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.mpi import jobs
from tests.mpi.conftest import command_line
from tests.mpi.mpirun import ENVIRONMENT, PROJECT, error_lines
from worker.checkpoint import list_checkpoints, read_checkpoint

LAUNCHER_SECONDS = 40.0  # to start and to end a few ranks and servers, on a machine that others use too
AT_A_TIME = 4
STEPS_AN_EPOCH, EPOCHS = 5, 3  # the fault lies in the second
PROGRAM = Path(__file__).parent / "programs" / "faulty_phase.py"

NO_STALL_SECONDS = 30.0  # where nothing is to be taken for a stall
# Rows that wait for the limit. A server may take half of it to come back, and needs a second or two.
STALL_SECONDS = {"stop": 1.5, "stop_server": 1.5, "lose_server": 4.0, "kill_server_for_good": 4.0}


class Way(NamedTuple):
    """How a row's job exchanges its gradients."""

    ranks: int
    sync: object
    training: dict[str, object]


def _servers(**settings: object) -> dict[str, object]:
    return {"parameter_server": {"servers": 2, "snapshot_steps": 2} | settings}


WAYS = {
    "all_reduce": Way(2, "all_reduce", {}),
    "apart": Way(3, {"all_reduce": {"shared_memory": False}}, {}),
    "one_server": Way(2, _servers(servers=1), {}),
    "servers": Way(2, _servers(), {}),
    "bounded": Way(2, _servers(mode="bounded_staleness"), {}),
    "asynchronous": Way(2, _servers(mode="asynchronous"), {}),
    "lossy": Way(2, _servers(wire_format="int8"), {}),
    "reproducible": Way(3, _servers(), {"reproducible": True}),
}


class Fault(NamedTuple):
    """What goes wrong, as of faulty_phase.py."""

    what: str
    phase: str
    way: str
    rank: int = 0  # where it is, or whose server has it
    epochs: int = EPOCHS

    def __str__(self) -> str:
        return f"{self.what}-{self.phase}-{self.way}-{self.epochs}"


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


class Rows:
    """The rows of one table, each of which waits until it is done."""

    def __init__(self, futures: dict[Fault, "Future[Row]"]) -> None:
        self._futures = futures

    def __getitem__(self, fault: Fault) -> Row:
        return self._futures[fault].result()


@contextmanager
def run_rows(folder: Path, faults: Sequence[Fault]) -> Iterator[Rows]:
    """Put each of the faults into a small job of its own, in their order, AT_A_TIME."""
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        try:
            yield Rows({fault: pool.submit(_run_row, folder / str(fault), fault) for fault in faults})
        finally:
            pool.shutdown(cancel_futures=True)


def _run_row(folder: Path, fault: Fault) -> Row:
    way, stall_seconds = WAYS[fault.way], STALL_SECONDS.get(fault.what, NO_STALL_SECONDS)
    processes, logs = folder / "processes", folder / "logs"
    processes.mkdir(parents=True)
    logs.mkdir()
    job = jobs.write_job(
        folder, jobs.write_data(folder / "data.npz"), sync=way.sync, limits={"stall_seconds": stall_seconds},
        training={"epochs": fault.epochs} | way.training,
    )  # fmt: skip
    began = time.monotonic()
    program = [PROGRAM, *fault[:2], fault.rank, folder, "train", job, "-o", folder / "out"]
    # Its own, as one mpirun removes what another one needs. Servers may still be at their ends in it.
    with tempfile.TemporaryDirectory(prefix="pl-", ignore_cleanup_errors=True) as session:
        done = subprocess.run(
            command_line(way.ranks, program),
            capture_output=True,
            text=True,
            timeout=2 * stall_seconds + LAUNCHER_SECONDS,
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(PROJECT), "TMPDIR": session},
            check=False,
        )
    seconds = time.monotonic() - began
    started = [path.read_text() for path in processes.iterdir()]
    while (
        running := [process for process in started if _runs(process)]
    ) and time.monotonic() < began + LAUNCHER_SECONDS:
        time.sleep(0.05)  # the kernel still ends them
    said = "".join([done.stdout, done.stderr, *(path.read_text() for path in sorted(logs.iterdir()))])
    assert "Traceback" not in said, said
    return Row(done.returncode, said, seconds, folder / "out", len(started), running)


def _runs(process: str) -> bool:
    try:
        return "faulty_phase" in Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return False
