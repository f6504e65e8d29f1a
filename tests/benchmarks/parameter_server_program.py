"""One process of a parameter-server round trip, or of the raw gRPC echo it is compared with.

    serve echo-threads|echo-loop
    serve shard START_FILE WORKERS FIRST ELEMENTS       the elements of START_FILE, which begin at FIRST of so many
    work echo ELEMENTS ADDRESS...
    work shard ELEMENTS WORKER WORKERS ADDRESS...

A server says `listening HOST:PORT`; a worker says `ready`, then makes a round trip for each line it is given and says
the seconds. The echo is gRPC with bytes in and bytes out, in chunks of about 1 MB as the shards take them; its server
is one of threads or one on an event loop. Each ends with its standard input.
"""

import asyncio
import os
import queue
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from protos import job_pb2
from worker.server.process import Part, serve_parameters
from worker.sync.parameter_server import ParameterServerExchange
from worker.sync.server_opening import shard_parts

CHUNK_BYTES = 1 << 20
ECHO = "/echo/Echo"
TOKEN = "benchmark"
DIGEST = "0" * 64
ADAM = job_pb2.Optimizer(adam=job_pb2.AdamOptimizer(learning_rate=0.001, beta1=0.9, beta2=0.999, epsilon=1e-8))


def serve_shard(start_file: str, workers: int, first: int, elements: int) -> None:
    """A parameter server with Adam."""
    os.environ["PACELINE_JOB_TOKEN"] = TOKEN
    serve_parameters(Path(start_file), job_pb2.JobSpec(optimizer=ADAM), workers, part=Part(first, elements))


def serve_echo_on_threads() -> None:
    """A thread for each worker's stream."""

    def echo(requests: Iterator[bytes], _context: Any) -> Iterator[bytes]:
        yield from requests

    server = grpc.server(ThreadPoolExecutor(8))
    listen(server, echo)
    server.start()
    sys.stdin.read()
    server.stop(0)


def serve_echo_on_a_loop() -> None:
    """One thread for all streams."""

    async def echo(_requests: Any, context: Any) -> None:
        while (data := await context.read()) is not grpc.aio.EOF:
            await context.write(data)

    async def serve() -> None:
        server = grpc.aio.server()
        listen(server, echo)
        await server.start()
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        await server.stop(0)

    asyncio.run(serve())


def listen(server: Any, behaviour: Callable[..., Any]) -> None:
    """Have `server` echo by `behaviour`, and say where."""
    method = grpc.stream_stream_rpc_method_handler(behaviour)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("echo", {"Echo": method}),))
    print(f"listening 127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", flush=True)


def echo_trip(addresses: Sequence[str], elements: int) -> Callable[[int], None]:
    """A round trip of so many float32, each server getting the part that a shard would."""
    streams = []
    for address, (start, stop) in zip(addresses, shard_parts(elements, len(addresses)), strict=True):
        payload = bytes(4 * (stop - start))
        chunks = [payload[first : first + CHUNK_BYTES] for first in range(0, len(payload), CHUNK_BYTES)]
        outgoing: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        streams.append((grpc.insecure_channel(address).stream_stream(ECHO)(iter(outgoing.get, None)), outgoing, chunks))

    def trip(_step: int) -> None:
        for _, outgoing, chunks in streams:
            for chunk in chunks:
                outgoing.put(chunk)
        for incoming, _, chunks in streams:
            for _ in chunks:
                next(incoming)

    return trip


def shard_trip(addresses: Sequence[str], elements: int, worker: int, workers: int) -> Callable[[int], None]:
    """A step of the exchange with parameter servers: push, update, pull."""
    exchange = ParameterServerExchange(
        addresses, worker, workers, 1, TOKEN, DIGEST, np.zeros(elements, np.float32),
        np.full(elements, 1e-3, np.float32), np.zeros(2),
    )  # fmt: skip
    exchange.join()
    return lambda step: exchange.step(step, 256, 1e-3)


def work(trip: Callable[[int], None]) -> None:
    """One line in, one round trip, its seconds out; until the input ends."""
    print("ready", flush=True)
    for step, _ in enumerate(sys.stdin, start=1):
        began = time.perf_counter()
        trip(step)
        print(time.perf_counter() - began, flush=True)


def main() -> None:
    """Be what the arguments say."""
    match sys.argv[1:]:
        case ["serve", "echo-threads"]:
            serve_echo_on_threads()
        case ["serve", "echo-loop"]:
            serve_echo_on_a_loop()
        case ["serve", "shard", start_file, workers, first, elements]:
            serve_shard(start_file, int(workers), int(first), int(elements))
        case ["work", "echo", elements, *addresses]:
            work(echo_trip(addresses, int(elements)))
        case ["work", "shard", elements, worker, workers, *addresses]:
            work(shard_trip(addresses, int(elements), int(worker), int(workers)))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
