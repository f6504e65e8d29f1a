"""Sums over all ranks in the middle of a step: what synchronized layers exchange.

Rules: every rank calls it equally often, in the same order and with vectors of the same size. The sum is taken in rank
order, so it has the same bits on every rank.
"""

from __future__ import annotations

import numpy as np

from worker.sync.node import Node
from worker.sync.world import World


class Reduction:
    """Adds up a float64 vector over all ranks: through the node's shared memory where one node holds them all.

    There it costs one fence: two sets of segments take turns, and by the time a set is written again every rank has
    passed the fence of the other, so has read the first. Between nodes MPI does it.
    """

    def __init__(self, world: World, node: Node) -> None:
        self._world = world
        self._node = node
        self._turns: list[list[np.ndarray]] = []  # made by the first call, larger ones by the first that needs them
        self._turn = 0

    def __call__(self, values: np.ndarray) -> None:
        """Replace `values` by the sum over all ranks. Collective."""
        node = self._node
        if self._world.size == 1:
            return
        if node.size < self._world.size:
            self._world.sum(values)
            return
        if not self._turns or self._turns[0][0].size < values.size:
            self._turns = [node.segments(values.size, np.float64) for _ in range(2)]
        segments = self._turns[self._turn]
        self._turn = 1 - self._turn
        segments[node.rank][: values.size] = values
        node.fence()
        np.copyto(values, segments[0][: values.size])
        for segment in segments[1:]:
            np.add(values, segment[: values.size], out=values)
