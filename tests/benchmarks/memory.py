"""What 1, 2 and 4 ranks take of a machine's memory together: with one copy of the weights, and with one a rank.

Rules: memory is the proportional set size that Linux states for a process (proc(5), smaps_rollup): a page that several
processes share counts for each in part, so the sum over the ranks is what they take together, libraries and shared
windows once. It is read while the ranks train; the largest sum counts. Launchers (mpirun) are left out.
"""

import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from tests.benchmarks.cases import mlp
from tests.benchmarks.contenders import EAGER, OURS, Contender, Run, paceline, peer
from tests.benchmarks.data_set import write_data
from tests.benchmarks.measurement import BenchmarkFailed
from tests.benchmarks.section import Section, Setting
from tests.benchmarks.spread import spread
from tests.benchmarks.table import Table, format_spread

RANKS = (1, 2, 4)
UNITS = (784, 2048, 2048, 10)
CASE = mlp("large", UNITS, 256, 4_096)
EPOCHS = 4
READING_SECONDS = 0.05  # between two readings
LAUNCHERS = ("mpirun", "prterun", "prted")
SHARED, COPIES, PEER = "Paceline, shared window", "Paceline, shared_memory: false", "PyTorch DDP, gloo"
CAPTION = """\
Memory of all ranks together on one machine: proportional set sizes (a shared page counts once in all), added up while
they train {network} with Adam, batch {batch} a rank; a copy of the weights is {megabytes:.1f} MB.
The largest sum of a run, median [lowest .. highest] over the rounds; launchers left out. "shared_memory: false": plain
all-reduce, each rank with weights, gradient and moments of its own. One rank of PyTorch is eager mode."""


class Watch:
    """Within the block, adds up the memory of all processes that this one has started, and theirs."""

    def __init__(self) -> None:
        self.largest_bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._read_on, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def read(self) -> None:
        """Read once; the thread does it all the time."""
        self.largest_bytes = max(self.largest_bytes, sum(map(proportional_bytes, descendants(os.getpid()))))

    def _read_on(self) -> None:
        while not self._done.wait(READING_SECONDS):
            self.read()


def descendants(root: int) -> list[int]:
    """Ids of the processes that `root` and its children started, launchers left out."""
    names: dict[int, str] = {}
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended in the meantime
            before, _, after = stat.read_text().rpartition(")")
            number, _, name = before.partition(" (")
            names[int(number)] = name
            children.setdefault(int(after.split()[1]), []).append(int(number))
    found, unvisited = [], [root]
    while unvisited:
        started = children.get(unvisited.pop(), [])
        unvisited += started
        found += [pid for pid in started if names[pid] not in LAUNCHERS]
    return found


def proportional_bytes(pid: int) -> int:
    """Its proportional set size; 0 once it has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def contenders(ranks: int) -> tuple[Contender, ...]:
    """Who is measured on so many ranks; one rank has nobody to share with."""
    shared = Contender(SHARED, OURS, ranks, paceline(ranks, "all_reduce"))
    if ranks == 1:
        return shared, Contender(PEER, EAGER, ranks, peer("pytorch_eager.py"))
    copies = Contender(COPIES, OURS, ranks, paceline(ranks, {"all_reduce": {"shared_memory": False}}))
    return shared, copies, Contender(PEER, EAGER, ranks, peer("pytorch_ddp.py", {"WORLD_SIZE": str(ranks)}))


def memory_table(measured: Mapping[tuple[int, str], Sequence[float]]) -> Table:
    """A row for each number of ranks and program; `measured` are bytes, round by round."""
    rows = []
    for (ranks, name), found in measured.items():
        single = measured[1, PEER if name == PEER else SHARED]
        added = [(own - one) / (ranks - 1) for own, one in zip(found, single, strict=True)] if ranks > 1 else []
        cells = [
            format_spread(spread(value / 1e6 for value in values), 0) if values else "" for values in (found, added)
        ]
        rows.append((CASE.title, str(ranks), name, *cells))
    return Table(("network", "ranks", "program", "MB of all ranks", "MB a rank more"), rows)


def run(setting: Setting) -> Section:
    """All rounds."""
    parameters = sum((inputs + 1) * outputs for inputs, outputs in pairwise(UNITS))
    case = CASE._replace(samples=2 * max(RANKS) * CASE.batch_size) if setting.quick else CASE
    data = write_data(setting.scratch, case)
    measured: dict[tuple[int, str], list[float]] = {}
    for number in range(1, setting.rounds + 1):
        for contender in (contender for ranks in RANKS for contender in contenders(ranks)):
            folder = setting.scratch / "memory"
            folder.mkdir()
            try:
                with Watch() as watch:
                    contender.measure(Run(case, EPOCHS, data, folder, setting.peers_python))
            except BenchmarkFailed as failed:
                raise BenchmarkFailed(f"memory of {contender.name} on {contender.ranks} ranks: {failed}") from failed
            finally:
                shutil.rmtree(folder)
            measured.setdefault((contender.ranks, contender.name), []).append(watch.largest_bytes)
            setting.say(f"round {number} of {setting.rounds}  memory  {contender.ranks} ranks  {contender.name}")
    caption = CAPTION.format(network=CASE.network, batch=CASE.batch_size, megabytes=4 * parameters / 1e6)
    return Section((memory_table(measured),), caption)
