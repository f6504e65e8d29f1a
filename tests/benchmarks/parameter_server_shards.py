"""Round trips through 1, 2 and 4 parameter servers, with 1 to 4 workers.

Run as `python -m tests.benchmarks.parameter_server_shards [--size "23.3 MB"] [--rounds 20]`.

A process for each server and for each worker, all workers starting each round trip together, Adam in the servers.
Rounds alternate between the rows, so that a busy machine is busy for all; the figure is the median over the rounds of
the slowest worker's time, beside its ratio to one server with as many workers.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from protos import job_pb2
from tests.benchmarks.parameter_server_round_trip import DIGEST, OPTIMIZERS, SIZES, TOKEN
from worker.checkpoint import Checkpoint, write_checkpoint
from worker.server.process import Part, serve_parameters
from worker.sync.parameter_server import ParameterServerExchange
from worker.sync.server_exchange import shard_parts

SERVERS = (1, 2, 4)
WORKERS = (1, 2, 3, 4)
WARM_UP_ROUNDS = 3


def serve(start_file: str, workers: int, first: int, count: int) -> None:
    os.environ["PACELINE_JOB_TOKEN"] = TOKEN
    serve_parameters(Path(start_file), job_pb2.JobSpec(optimizer=OPTIMIZERS["adam"]), workers, part=Part(first, count))


def work(addresses: list[str], count: int, worker: int, workers: int) -> None:
    """One line in, one round trip, its seconds out; until the input ends."""
    exchange = ParameterServerExchange(
        addresses, worker, workers, 1, TOKEN, DIGEST, np.zeros(count, np.float32),
        np.full(count, 1e-3, np.float32), np.zeros(2),
    )  # fmt: skip
    exchange.join()
    print("ready", flush=True)
    for step, _ in enumerate(sys.stdin, start=1):
        began = time.perf_counter()
        exchange.step(step, 256, 1e-3)
        print(time.perf_counter() - began, flush=True)


class Row:
    """So many servers and workers, as processes."""

    def __init__(self, count: int, servers: int, workers: int, folder: Path) -> None:
        self.processes: list[subprocess.Popen[str]] = []
        self.seconds: list[float] = []
        addresses = []
        for first, stop in shard_parts(count, servers):
            start_file = folder / f"{first}-{stop}.safetensors"
            write_checkpoint(start_file, Checkpoint(0, 0, 0, DIGEST, [], np.zeros(stop - first, np.float32), {}))
            addresses.append(self._start("serve", start_file, workers, first, count).split()[1])
        starting = [("work", count, worker, workers, *addresses) for worker in range(workers)]
        for arguments in starting:
            self._start(*arguments)
        self.workers = self.processes[-workers:]

    def round(self) -> float:
        """The slowest worker's seconds."""
        for process in self.workers:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        return max(float(process.stdout.readline()) for process in self.workers if process.stdout)

    def stop(self) -> None:
        """End every process of the row."""
        for process in self.processes:
            process.kill()
            process.wait()

    def _start(self, *arguments: object) -> str:
        command = [sys.executable, "-m", "tests.benchmarks.parameter_server_shards", *map(str, arguments)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.processes.append(process)
        assert process.stdout is not None
        return process.stdout.readline()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="23.3 MB")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    for workers in WORKERS:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            rows = {servers: Row(SIZES[options.size], servers, workers, Path(folder)) for servers in SERVERS}
            for row in rows.values():
                stack.callback(row.stop)
            for number in range(WARM_UP_ROUNDS + options.rounds):
                for row in rows.values():
                    seconds = row.round()
                    if number >= WARM_UP_ROUNDS:
                        row.seconds.append(seconds)
            medians = {servers: 1e3 * statistics.median(row.seconds) for servers, row in rows.items()}
        cells = "  ".join(f"{n} servers {took:7.2f} ms {took / medians[1]:.2f}x" for n, took in medians.items())
        print(f"{options.size}  {workers} workers  {cells}", flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", start_file, workers, first, count]:
            serve(start_file, int(workers), int(first), int(count))
        case ["work", count, worker, workers, *addresses]:
            work(addresses, int(count), int(worker), int(workers))
        case _:
            main()
