"""Sums over all ranks in the middle of a step: what synchronized layers exchange.

Rules: every rank calls it equally often, in the same order and with vectors of the same size. The sum is taken in rank
order, so it has the same bits on every rank.
"""

from __future__ import annotations

import numpy as np

from worker.sync.node import Node, shared_memory_shortage
from worker.sync.world import World

PAGE_BYTES = 4096  # what a segment may take beside its elements


class Reduction:
    """Adds up a float64 vector over all ranks: through the node's shared memory where one node holds them all.

    There it costs one fence: two sets of segments take turns, and by the time a set is written again every rank has
    passed the fence of the other, so has read the first. Between nodes MPI does it, and where the segments would not
    fit into shared memory.
    """

    def __init__(self, world: World, node: Node) -> None:
        self._world = world
        self._node = node
        self._turns: list[list[np.ndarray]] = []  # made by the first call, larger ones by the first that needs them
        self._turn = 0
        self._between_ranks = node.size < world.size

    def __call__(self, values: np.ndarray) -> None:
        """Replace `values` by the sum over all ranks. Collective."""
        node = self._node
        if self._world.size == 1:
            return
        if not self._between_ranks and (not self._turns or self._turns[0][0].size < values.size):
            self._make_room(values.size)
        if self._between_ranks:
            self._world.sum(values)
            return
        segments = self._turns[self._turn]
        self._turn = 1 - self._turn
        segments[node.rank][: values.size] = values
        node.fence()
        np.copyto(values, segments[0][: values.size])
        for segment in segments[1:]:
            np.add(values, segment[: values.size], out=values)

    def _make_room(self, elements: int) -> None:
        """Segments for larger vectors. The old windows stay until the node is closed."""
        node = self._node
        shortage = shared_memory_shortage(2 * node.size * (8 * elements + PAGE_BYTES))
        if any(self._world.gather_everywhere(shortage is not None)):
            self._between_ranks = True
        else:
            self._turns = [node.segments(elements, np.float64) for _ in range(2)]
