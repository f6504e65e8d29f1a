"""What a shard needs to know of a reproducible job: which subtrees each worker pushes, and how they are added up.

A worker's push of a chunk holds one row for each of its maximal subtrees of virtual shards, and its totals one for
each virtual shard, in their order. Who pushes what follows from the numbers of shards and workers alone.

Rules: no I/O; the sums are those of sync/reproducible.py to the last bit.
"""

import math
from collections.abc import Sequence

import numpy as np

from worker.clipping import sum_of_squares
from worker.exact_sums import exact_totals, pieces, square_sums
from worker.optimizers import Ranges
from worker.sync.reduction_tree import Subtree, fold, merge, own_shards, shard_totals
from worker.wire import Float32


class Subtrees:
    """The subtrees of `workers` that share `shards` virtual shards."""

    def __init__(self, shards: int, workers: int) -> None:
        self.shards = [stop - start for start, stop in (own_shards(shards, w, workers) for w in range(workers))]
        parts: list[Subtree] = []
        self.rows = []  # of a worker's push
        for worker in range(workers):
            held = fold(*own_shards(shards, worker, workers), shards).subtrees
            self.rows.append(len(held))
            parts += held
        self._merges, remaining = merge(parts, shards)
        (self._root,) = remaining

    def total(self, gradients: Sequence[Float32], elements: int) -> Float32:
        """The sum over all virtual shards of a chunk of `elements`, from every worker's rows in worker order."""
        parts = [row for gradient in gradients for row in gradient.reshape(-1, elements)]
        for into, source in self._merges:
            parts[into] = np.add(parts[into], parts[source])
        return parts[self._root]

    def totals(self, pushed: Sequence[Sequence[float]]) -> tuple[float, ...]:
        """The totals over all virtual shards, from every worker's in worker order; empty where none were pushed."""
        rows = np.array([value for totals in pushed for value in totals]).reshape(sum(self.shards), -1)
        return tuple(shard_totals(rows).tolist())

    def agree(self, worker: int, count: int, other: int, other_count: int) -> bool:
        """Whether so many totals of one worker and of another are of as many for each of their shards."""
        return count * self.shards[other] == other_count * self.shards[worker]

    def fits(self, worker: int, count: int) -> bool:
        """Whether `count` totals are as many for each of the worker's shards."""
        shards = self.shards[worker]
        return count % shards == 0 if shards else count == 0


def exact_square_sum(vector: Float32) -> float:
    """Of the whole flat vector."""
    return math.fsum(sum_of_squares(vector[piece.start : piece.stop]) for piece in pieces([(0, len(vector))]))


def exact_square_sums(parameters: Float32, direction: Float32, ranges: Ranges) -> np.ndarray:
    """As trust_ratio.SquareSums over the whole flat vectors, (ranges, 2)."""
    of = pieces(ranges)
    return np.array([exact_totals(square_sums(vector, 0, of), of, len(ranges)) for vector in (parameters, direction)]).T
