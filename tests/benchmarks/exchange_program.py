"""One way of exchanging gradients between two processes, alone: KIND ELEMENTS... -> JSON, seconds by elements.

Under mpirun: `window` is a step of Paceline's all-reduce with plain gradient descent, so that it holds the sum over
both ranks, the update and the publishing of the weights; `nodes` is the same where every rank counts as a machine of
its own; `mpi` is MPI.Allreduce in place. Without: `echo` sends as many bytes over a raw gRPC stream and back.

Rules: a figure is the median of the calls' times, each that of the slower process; the first calls are thrown away.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.benchmarks.parameter_server_program import echo_trip

WARM_UP_CALLS, MOST_CALLS, SECONDS = 3, 200, 1.0


def median_seconds(call: Callable[[int], float]) -> float:
    """Of as many calls as fit into SECONDS; `call` takes its number, from 1, and says how long it took."""
    times: list[float] = []
    number, spent = 0, 0.0
    while number < WARM_UP_CALLS + 1 or (spent < SECONDS and number < MOST_CALLS):
        number += 1
        seconds = call(number)
        if number > WARM_UP_CALLS:
            times.append(seconds)
            spent += seconds
    return statistics.median(times)


def open_ranks(kind: str) -> tuple[Any, Callable[[int], Callable[[int], float]]]:
    """The world, and from a number of elements to a timed call."""
    from mpi4py import MPI

    from protos import job_pb2
    from worker.optimizers import make_optimizer
    from worker.sync.all_reduce import AllReduceExchange
    from worker.sync.world import World

    world = World(ranks_per_node=1 if kind == "nodes" else None)
    sgd = job_pb2.Optimizer(sgd=job_pb2.SgdOptimizer(learning_rate=1e-3))

    def timed(act: Callable[[int], None]) -> Callable[[int], float]:
        def call(number: int) -> float:
            world.comm.Barrier()
            began = time.perf_counter()
            act(number)
            return float(max(world.gather_everywhere(time.perf_counter() - began)))

        return call

    def prepare(elements: int) -> Callable[[int], float]:
        if kind == "mpi":
            values = np.ones(elements, np.float32)
            return timed(lambda number: world.comm.Allreduce(MPI.IN_PLACE, values, op=MPI.SUM))
        exchange = AllReduceExchange(world, make_optimizer(sgd), elements, [], 1)
        exchange.gradient[:] = 1.0
        return timed(lambda number: exchange.step(number, 2, 1e-3))

    return world, prepare


def start_echo() -> "subprocess.Popen[str]":
    """A server of echoes."""
    command = (sys.executable, "-m", "tests.benchmarks.parameter_server_program", "serve", "echo-threads")
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def main() -> None:
    """Measure every size, then print."""
    kind, sizes = sys.argv[1], [int(word) for word in sys.argv[2:]]
    found: dict[int, float] = {}
    if kind == "echo":
        for elements in sizes:
            server = start_echo()
            assert server.stdout is not None
            trip = echo_trip([server.stdout.readline().split()[1]], elements)

            def call(number: int, trip: Callable[[int], None] = trip) -> float:
                began = time.perf_counter()
                trip(number)
                return time.perf_counter() - began

            found[elements] = median_seconds(call)
            server.kill()
            server.communicate(timeout=10)
        print(json.dumps(found))
        return
    world, prepare = open_ranks(kind)
    for elements in sizes:
        found[elements] = median_seconds(prepare(elements))
    if world.rank == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
