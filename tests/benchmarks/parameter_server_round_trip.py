"""A parameter-server round trip beside a raw gRPC stream echo of the same bytes.

Run as `python FILE [--workers 2] [--rounds 40]`.

Both sides run as they do in training: one server process and a process for each worker, all workers starting each
round trip together, chunks of about 1 MB. The echo is gRPC with bytes in and bytes out; its server is one of threads
or one on an event loop, and the faster counts. `echo-kept` is the threads' echo with our setting of malloc
(worker/wire.py): what the transport could give at best. Rounds alternate between the sides, so that a busy machine is
busy for all; the figure is the median over the rounds of the slowest worker's time.
"""

import argparse
import asyncio
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np

from protos import job_pb2
from worker.wire import keep_freed_memory

SIZES = {"0.4 MB": 100_000, "2.1 MB": 535_818, "23.3 MB": 5_824_522}  # parameters of the design's three models
CHUNK_BYTES = 1 << 20
ECHO = "/echo/Echo"
TOKEN = "benchmark"
DIGEST = "0" * 64
OPTIMIZERS = {
    "sgd": job_pb2.Optimizer(sgd=job_pb2.SgdOptimizer(learning_rate=0.01)),
    "adam": job_pb2.Optimizer(
        adam=job_pb2.AdamOptimizer(learning_rate=0.001, beta1=0.9, beta2=0.999, epsilon=1e-8)
    ),
}  # fmt: skip


def serve_echo(kind: str) -> None:
    if kind == "echo-kept":
        keep_freed_memory()

    def threaded(requests, _context):
        yield from requests

    async def looped(_requests, context):
        while (data := await context.read()) is not grpc.aio.EOF:
            await context.write(data)

    def handlers(behaviour):
        method = grpc.stream_stream_rpc_method_handler(behaviour)
        return (grpc.method_handlers_generic_handler("echo", {"Echo": method}),)

    async def serve_loop() -> None:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers(handlers(looped))
        print(f"listening 127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", flush=True)
        await server.start()
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        await server.stop(0)

    if kind == "echo-loop":
        asyncio.run(serve_loop())
        return
    server = grpc.server(ThreadPoolExecutor(8))
    server.add_generic_rpc_handlers(handlers(threaded))
    print(f"listening 127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", flush=True)
    server.start()
    sys.stdin.read()
    server.stop(0)


def serve_shard(optimizer: str, start_file: str, workers: int) -> None:
    from worker.server.process import serve_parameters

    os.environ["PACELINE_JOB_TOKEN"] = TOKEN
    serve_parameters(Path(start_file), job_pb2.JobSpec(optimizer=OPTIMIZERS[optimizer]), workers)


def echo_trip(address: str, count: int) -> Callable[[int], None]:
    payload = bytes(4 * count)
    chunks = [payload[first : first + CHUNK_BYTES] for first in range(0, len(payload), CHUNK_BYTES)]
    outgoing: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    stream = grpc.insecure_channel(address).stream_stream(ECHO)(iter(outgoing.get, None))

    def trip(_step: int) -> None:
        for chunk in chunks:
            outgoing.put(chunk)
        for _ in chunks:
            next(stream)

    return trip


def shard_trip(address: str, count: int, worker: int, workers: int) -> Callable[[int], None]:
    from worker.sync.parameter_server import ParameterServerExchange

    exchange = ParameterServerExchange(
        [address], worker, workers, 1, TOKEN, DIGEST, np.zeros(count, np.float32),
        np.full(count, 1e-3, np.float32), np.zeros(2),
    )  # fmt: skip
    exchange.join()
    return lambda step: exchange.step(step, 256, 1e-3)


def run_worker(kind: str, address: str, count: int, worker: int, workers: int) -> None:
    """One line in, one round trip, its seconds out; until the input ends."""
    if kind == "echo-kept":
        keep_freed_memory()
    trip = echo_trip(address, count) if kind.startswith("echo") else shard_trip(address, count, worker, workers)
    print("ready", flush=True)
    for step, _ in enumerate(sys.stdin, start=1):
        began = time.perf_counter()
        trip(step)
        print(time.perf_counter() - began, flush=True)


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


class Side:
    """A server and its workers."""

    def __init__(self, kind: str, count: int, workers: int, start_file: Path) -> None:
        self.server = start("serve", kind, start_file, workers)
        address = self.server.stdout.readline().split()[1]
        self.workers = [start("work", kind, address, count, worker, workers) for worker in range(workers)]
        for process in self.workers:
            process.stdout.readline()
        self.seconds: list[float] = []

    def round(self) -> float:
        for process in self.workers:
            process.stdin.write("\n")
            process.stdin.flush()
        return max(float(process.stdout.readline()) for process in self.workers)

    def stop(self) -> None:
        for process in (*self.workers, self.server):
            process.kill()
            process.wait()


def compare(name: str, count: int, workers: int, rounds: int, folder: Path) -> None:
    from worker.checkpoint import Checkpoint, write_checkpoint

    start_file = folder / f"{count}.safetensors"
    write_checkpoint(start_file, Checkpoint(0, 0, 0, DIGEST, [], np.zeros(count, np.float32), {}))
    sides = {
        kind: Side(kind, count, workers, start_file) for kind in ("echo-threads", "echo-loop", "echo-kept", *OPTIMIZERS)
    }
    for number in range(rounds + 3):
        for side in sides.values():
            seconds = side.round()
            if number >= 3:
                side.seconds.append(seconds)
    medians = {kind: statistics.median(side.seconds) * 1e3 for kind, side in sides.items()}
    for side in sides.values():
        side.stop()
    echo = min(medians["echo-threads"], medians["echo-loop"])
    columns = "  ".join(f"{kind} {milliseconds:7.2f} ms" for kind, milliseconds in medians.items())
    ratios = "  ".join(f"{kind} {medians[kind] / echo:.2f}x" for kind in OPTIMIZERS)
    print(f"{name:>8}  {columns}  |  {ratios}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, count in SIZES.items():
            compare(name, count, options.workers, options.rounds, Path(folder))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", kind, start_file, workers] if kind in OPTIMIZERS:
            serve_shard(kind, start_file, int(workers))
        case ["serve", kind, *_]:
            serve_echo(kind)
        case ["work", kind, address, count, worker, workers]:
            run_worker(kind, address, int(count), int(worker), int(workers))
        case _:
            main()
