"""Round trips through 1, 2 and 4 parameter servers with 1 to 4 workers, beside a raw gRPC echo of the same bytes.

Rules: a process for each server and each worker of both sides, all workers starting each trip together; a trip takes as
long as its slowest worker. The sides take turns trip by trip, so that a busy machine is busy for all. There are two
echoes, on threads and on an event loop, and the faster counts. Every wait for a process has a deadline.
"""

import os
import selectors
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.benchmarks.measurement import BenchmarkFailed, Command, make_environment
from tests.benchmarks.parameter_server_program import DIGEST
from tests.benchmarks.section import Section, Setting
from tests.benchmarks.spread import ratio_spread, spread
from tests.benchmarks.table import Table, format_spread
from worker.checkpoint import Checkpoint, write_checkpoint
from worker.sync.server_opening import shard_parts

PROGRAM = "tests.benchmarks.parameter_server_program"
SIZES = {"0.4 MB": 100_000, "2.1 MB": 535_818, "23.3 MB": 5_824_522}  # parameters of the three dense networks
SERVERS = (1, 2, 4)
WORKERS = (1, 2, 3, 4)
SHARD, ECHOES = "shard", ("echo-threads", "echo-loop")
WARM_UP_TRIPS, LEAST_TRIPS, MOST_TRIPS = 3, 3, 40
SECONDS = 0.5  # of a round, all sides together
DEADLINE_SECONDS = 60.0  # for a process to start, and for a trip
CAPTION = """\
Parameter servers: one step's round trip, push, Adam in the servers, pull; float32, the vector cut among the servers, a
process for each server and worker on this machine, milliseconds until the slowest worker has its weights. Echo: as many
bytes in the same chunks to as many gRPC servers and back, nothing done to them; the faster of a server on threads and
one on an event loop. Median [lowest .. highest] of the rounds' medians; ratios within rounds."""


class Case(NamedTuple):
    """A row of the table."""

    size: str
    servers: int
    workers: int

    @property
    def elements(self) -> int:
        return SIZES[self.size]


CASES = tuple(Case(size, servers, workers) for size in SIZES for workers in WORKERS for servers in SERVERS)
QUICK_CASES = tuple(case for case in CASES if (case.servers, case.workers) in ((1, 1), (4, 4)))


class Side:
    """The servers and workers of one side, as processes; a context that ends them."""

    def __init__(self, kind: str, case: Case, folder: Path) -> None:
        self._kind, self._case = kind, case
        self._processes: list[subprocess.Popen[str]] = []
        self._workers: list[subprocess.Popen[str]] = []
        try:
            self._start_all(folder)
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def trip(self) -> float:
        """The slowest worker's seconds."""
        for process in self._workers:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        return max(float(self._hear(process)) for process in self._workers)

    def stop(self) -> None:
        """End every process."""
        for process in self._processes:
            process.kill()
            process.communicate()

    def _start_all(self, folder: Path) -> None:
        elements, workers = self._case.elements, self._case.workers
        servers = []
        for first, stop in shard_parts(elements, self._case.servers):
            arguments: tuple[object, ...] = (self._kind,)
            if self._kind == SHARD:
                start_file = folder / f"{first}-{stop}.safetensors"
                write_checkpoint(start_file, Checkpoint(0, 0, 0, DIGEST, [], np.zeros(stop - first, np.float32), {}))
                arguments = (SHARD, start_file, workers, first, elements)
            servers.append(self._start("serve", *arguments))
        addresses = [self._hear(server).split()[1] for server in servers]
        for worker in range(workers):
            own = (SHARD, elements, worker, workers) if self._kind == SHARD else ("echo", elements)
            self._workers.append(self._start("work", *own, *addresses))
        for process in self._workers:
            self._hear(process)

    def _start(self, *arguments: object) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-m", PROGRAM, *map(str, arguments)],
            env=make_environment(os.environ, Command((), {})),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._processes.append(process)
        return process

    def _hear(self, process: "subprocess.Popen[str]") -> str:
        """Its next line; it never has two to say."""
        assert process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            heard = process.stdout.readline() if selector.select(DEADLINE_SECONDS) else None
        if heard:
            return heard
        what = f"said nothing for {DEADLINE_SECONDS:g} s" if heard is None else "ended"
        case = f"{self._case.size}, {self._case.servers} servers, {self._case.workers} workers"
        raise BenchmarkFailed(f"{self._kind} ({case}): a process {what}: {' '.join(map(str, process.args))}")


def measure(case: Case, rounds: int, seconds: float, folder: Path) -> dict[str, list[float]]:
    """The rounds' median seconds of each side."""
    found: dict[str, list[float]] = {kind: [] for kind in (SHARD, *ECHOES)}
    with ExitStack() as stack:
        sides = {kind: stack.enter_context(Side(kind, case, folder)) for kind in found}
        for _ in range(WARM_UP_TRIPS):
            for side in sides.values():
                side.trip()
        for _ in range(rounds):
            trips: dict[str, list[float]] = {kind: [] for kind in found}
            deadline = time.monotonic() + seconds
            while len(trips[SHARD]) < LEAST_TRIPS or (time.monotonic() < deadline and len(trips[SHARD]) < MOST_TRIPS):
                for kind, side in sides.items():
                    trips[kind].append(side.trip())
            for kind, taken in trips.items():
                found[kind].append(statistics.median(taken))
    return found


def server_table(measured: Mapping[Case, Mapping[str, Sequence[float]]]) -> Table:
    """A row for each case of what `measure` found."""
    rows = []
    for case, found in measured.items():
        own, echo = found[SHARD], min((found[kind] for kind in ECHOES), key=statistics.median)
        cells = [format_spread(spread(1e3 * value for value in values), 2) for values in (own, echo)]
        ratio = format_spread(ratio_spread(own, echo), 2)
        rows.append((case.size, str(case.workers), str(case.servers), *cells, ratio))
    headings = ("vector", "workers", "servers", "Paceline, ms", "gRPC echo, ms", "times the echo's")
    return Table(headings, rows)


def run(setting: Setting) -> Section:
    """All cases; a quick run does those of one server and one worker, and of the most of both."""
    measured = {}
    for case in QUICK_CASES if setting.quick else CASES:
        measured[case] = measure(case, setting.rounds, 0.0 if setting.quick else SECONDS, setting.scratch)
        setting.say(f"servers  {case.size}  {case.servers} servers  {case.workers} workers")
    return Section((server_table(measured),), CAPTION)
