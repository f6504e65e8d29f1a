"""How much of a gradient to exchange at a time, by a short measurement on the network of the run.

A small bucket sets out soon and leaves little behind the end of backward; one too small pays latency instead of
bandwidth. So it is the smallest that moves bytes nearly as fast as the best.

Rules: the measurement is bounded in time, and on a slow network stops at the sizes it can afford. Every rank comes to
the same size, since each time is that of the slowest.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np

from worker.sync.world import World

SIZES_BYTES = (64 << 10, 256 << 10, 1 << 20, 4 << 20)
AT_ONCE = 2  # buckets under way together, as in a step
REPEATS = 4  # of which the fastest counts: the first makes connections, and others are disturbed
BUDGET_SECONDS = 0.1
NEARLY = 0.8  # of the best rate


def measured_seconds(
    seconds_of: Callable[[int], float], largest_bytes: int, budget_seconds: float = BUDGET_SECONDS
) -> dict[int, float]:
    """Seconds to exchange AT_ONCE buckets, for each size up to `largest_bytes` that the budget can afford."""
    measured: dict[int, float] = {}
    spent, expected = 0.0, 0.0
    for size in SIZES_BYTES:
        if size > largest_bytes or spent + expected > budget_seconds:
            break
        times: list[float] = []
        while len(times) < REPEATS and (not times or spent + times[-1] <= budget_seconds):
            times.append(seconds_of(size))
            spent += times[-1]
        measured[size] = min(times)
        expected = measured[size] * SIZES_BYTES[1] / SIZES_BYTES[0]
    return measured


def best_size(measured: dict[int, float], largest_bytes: int) -> int:
    """The smallest size with nearly the best rate; `largest_bytes`, which is one bucket, where none was measured."""
    if not measured:
        return largest_bytes
    best_rate = max(size / seconds for size, seconds in measured.items())
    return min(size for size, seconds in measured.items() if size / seconds >= NEARLY * best_rate)


def measure_bucket_bytes(world: World, peers: Any, owns_slice: bool, largest_slice_bytes: int) -> int:
    """The bucket size in bytes, the same on every rank. Collective over all ranks.

    Args:
        peers: communicator of this rank's slice.
        largest_slice_bytes: of all ranks' slices, the same on every rank.
    """
    from mpi4py import MPI

    room = np.zeros(AT_ONCE * min(SIZES_BYTES[-1], largest_slice_bytes) // 4 if owns_slice else 0, np.float32)

    def seconds_of(size: int) -> float:
        world.comm.Barrier()
        began = perf_counter()
        if owns_slice:
            parts = np.split(room[: AT_ONCE * size // 4], AT_ONCE)
            MPI.Request.Waitall([peers.Iallreduce(MPI.IN_PLACE, part, op=MPI.SUM) for part in parts])
        return float(max(world.gather_everywhere(perf_counter() - began)))

    return best_size(measured_seconds(seconds_of, largest_slice_bytes), largest_slice_bytes)
