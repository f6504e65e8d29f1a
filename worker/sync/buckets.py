"""A slice exchanged between nodes in buckets, which set out while backward still runs.

The finished gradient is a suffix of the flat vector. Each rank says in shared memory how far its backward has come; the
owner of a slice sums a bucket over the node's segments as soon as all local ranks have passed it, and starts a
non-blocking all-reduce with its peers. What could not set out early does so in `finish`.

Rules: buckets set out from the end of a slice to its front, on all peers in this order, whatever the moment, on a
communicator of their own: that is what pairs them. Which sums are made, and in which order, does not hang on the moment
either, so the result has the same bits as without overlap. Only so many are under way at once, since each costs MPI a
buffer. Backward never waits.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import numpy as np

from worker.engine.layers.layer import Finished
from worker.sync.between_nodes import Slice, sum_in_order
from worker.sync.bucket_size import measure_bucket_bytes
from worker.sync.node import Node
from worker.sync.statistics import ExchangeStatistics
from worker.sync.world import World

# What may be under way at once: so many buckets, or so many bytes where that is more buckets.
FEWEST_AT_ONCE = 8
BYTES_AT_ONCE = 4 << 20


class Bucket(NamedTuple):
    """A part of the slice that travels at a time."""

    start: int  # its first element in the vector
    gradients: list[np.ndarray]  # views into each local rank's segment
    total: np.ndarray


class Buckets:
    """The exchange of one rank's slice. Collective over all ranks to make.

    Args:
        parameter_count: elements of the whole vector.
        largest_slice: elements of the largest slice of all.
        overlap: whether buckets may set out before `finish`; the result is the same.
    """

    def __init__(
        self,
        world: World,
        node: Node,
        own: Slice,
        parameter_count: int,
        largest_slice: int,
        statistics: ExchangeStatistics,
        overlap: bool = True,
    ) -> None:
        self._node = node
        self._statistics = statistics
        self._parameter_count = parameter_count
        self._peers = own.peers.Dup()  # what else the peers exchange cannot come between the buckets
        self.bucket_bytes = measure_bucket_bytes(world, self._peers, own.total.size > 0, 4 * largest_slice)
        self._buckets = cut(own, max(1, self.bucket_bytes // 4))
        # How far each local rank has come, growing from step to step: 0 is before the first.
        self._progress = node.segments(1, np.int64)
        self._under_way: deque[Any] = deque()
        self._most_under_way = max(FEWEST_AT_ONCE, BYTES_AT_ONCE // max(1, self.bucket_bytes))
        self._next = 0  # bucket to set out
        self._steps = 0
        self._early = 0  # buckets that set out before `finish`, over all steps
        self.finished: Finished | None = self._finished if overlap else None
        size = f"{self.bucket_bytes / 1e3:.0f} KB"
        whole = self.bucket_bytes >= 4 * largest_slice
        how = f"one bucket of {size}" if whole else f"buckets of {size}, as measured at the start"
        self.lines = [f"gradients travel between nodes in {how}"]

    def finish(self) -> None:
        """As in BetweenNodes."""
        self._early += self._next
        while self._next < len(self._buckets):
            if len(self._under_way) == self._most_under_way:
                self._under_way.popleft().Wait()
            self._set_out()
        while self._under_way:
            self._under_way.popleft().Wait()
        self._next = 0
        self._steps += 1

    def facts(self) -> dict[str, Any]:
        """The bucket size, how many there are in this rank's slice, and how many of them set out early in a step."""
        early = self._early / self._steps if self._steps else 0.0
        return {
            "bucket_bytes": self.bucket_bytes,
            "buckets": len(self._buckets),
            "buckets_started_in_backward": round(early, 3),
        }

    def _finished(self, first: int) -> None:
        """This rank's gradient is finished from element `first` on: let go what can."""
        node = self._node
        node.sync()  # the gradient before the word that it is there
        self._progress[node.rank][0] = self._steps * (self._parameter_count + 1) + self._parameter_count - first
        node.sync()
        if not self._buckets:
            return
        while self._under_way and self._under_way[0].Test():
            self._under_way.popleft()
        finished_from = self._node_finished_from()
        while (
            self._next < len(self._buckets)
            and self._buckets[self._next].start >= finished_from
            and len(self._under_way) < self._most_under_way
        ):
            self._set_out()

    def _node_finished_from(self) -> int:
        """From which element on every local rank's gradient of this step is finished."""
        before = self._steps * (self._parameter_count + 1)  # a rank that has said nothing in this step has no more
        come = min(int(progress[0]) for progress in self._progress) - before
        self._node.sync()  # their words before their gradients
        return self._parameter_count - max(0, come)

    def _set_out(self) -> None:
        """Start the next bucket: summed over the node, then between the nodes."""
        from mpi4py import MPI

        bucket = self._buckets[self._next]
        self._next += 1
        source: Any = MPI.IN_PLACE
        if len(bucket.gradients) == 1:
            source = bucket.gradients[0]
        else:
            sum_in_order(bucket.gradients, bucket.total)
        self._under_way.append(self._peers.Iallreduce(source, bucket.total, op=MPI.SUM))
        self._statistics.sent("mpi", bucket.total.nbytes)
        self._statistics.received("mpi", bucket.total.nbytes)


def cut(own: Slice, elements: int) -> list[Bucket]:
    """A slice in buckets of `elements`, from its end to its front; the first, at the end, may be smaller."""
    buckets = []
    for low in reversed(range(0, own.total.size, elements)):
        part = slice(low, low + elements)
        buckets.append(Bucket(own.start + low, [gradient[part] for gradient in own.gradients], own.total[part]))
    return buckets
