"""PowerSGD between nodes: the slice's weight matrices as all-reduced factors, the rest of the slice as float32.

The rest rides with the first factors in one all-reduce; the second factors take another. Each node keeps of its own
matrix what its projection on the common columns leaves, M - P (M^T P)^T: the residuals' sum is what the sum lost.

Rules: as in compressed_reduction.py. The sum of factors is MPI's, which gives every node the same bits as it does for
gradients.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from worker.compression.codec import BLOCK_ELEMENTS, Float32
from worker.compression.power_sgd import first_factor, matrices_within, orthonormalize, product
from worker.engine.params import ParameterSlot
from worker.sync.compression_costs import CompressionCosts


class PowerSgdReduction:
    """As CompressedReduction."""

    def __init__(self, peers: Any, rank: int, bounds: tuple[int, int], slots: tuple[ParameterSlot, ...]) -> None:
        elements = bounds[1] - bounds[0]
        self.residual = np.zeros(elements, np.float32)
        self.costs = CompressionCosts(peers)
        self._peers = peers
        self._matrices = matrices = matrices_within(slots, bounds, rank)
        edges = [0, *(edge for matrix in matrices for edge in (matrix.start, matrix.stop)), elements]
        self._rest = [slice(a, b) for a, b in list(pairwise(edges))[::2] if a < b]
        self._residuals = [self.residual[m.start : m.stop].reshape(m.rows, m.columns) for m in matrices]
        self._first = np.empty(
            rank * sum(m.rows for m in matrices) + sum(r.stop - r.start for r in self._rest), np.float32
        )
        self._second = np.empty(rank * sum(m.columns for m in matrices), np.float32)
        self._left = _cut(self._first, rank, [m.rows for m in matrices])
        self._right = _cut(self._second, rank, [m.columns for m in matrices])
        self._starts = [first_factor(matrix, rank) for matrix in matrices]
        for factor, start in zip(self._right, self._starts, strict=True):
            factor[:] = start
        self._tail = self._first[rank * sum(m.rows for m in matrices) :]
        widest = max([BLOCK_ELEMENTS, *(m.columns for m in matrices)])
        self._scratch = np.empty(widest, np.float32)
        self._own = np.empty(max([0, *(m.rows * m.columns for m in matrices)]), np.float32)

    def factors(self) -> Float32:
        """As in CompressedReduction: Q of every matrix."""
        return self._second

    def take_factors(self, factors: Float32) -> None:
        """As in CompressedReduction."""
        self._second[:] = factors

    def reduce(self, total: np.ndarray, samples: int) -> None:
        """As in CompressedReduction."""
        from mpi4py import MPI

        costs, scale = self.costs, np.float32(1 / samples)
        costs.begin()
        with costs.coding():
            for matrix, left, right, own in zip(self._matrices, self._left, self._right, self._residuals, strict=True):
                self._add_scaled(own.reshape(-1), total[matrix.start : matrix.stop], scale)
                np.matmul(right, own.T, out=left)
            position = 0
            for rest in self._rest:
                length = rest.stop - rest.start
                self._tail[position : position + length] = total[rest]
                position += length
        self._peers.Allreduce(MPI.IN_PLACE, self._first, op=MPI.SUM)
        with costs.coding():
            for left, right, own in zip(self._left, self._right, self._residuals, strict=True):
                orthonormalize(left)
                np.matmul(left, own, out=right)
                lost = self._own[: own.size].reshape(own.shape)
                np.matmul(left.T, right, out=lost)
                np.subtract(own, lost, out=own)
        self._peers.Allreduce(MPI.IN_PLACE, self._second, op=MPI.SUM)
        with costs.coding():
            for matrix, left, right, start in zip(self._matrices, self._left, self._right, self._starts, strict=True):
                part = total[matrix.start : matrix.stop]
                product(left, right, part.reshape(matrix.rows, matrix.columns), self._scratch)
                np.multiply(part, np.float32(samples), out=part)
                for row, fresh in zip(right, start, strict=True):
                    if not row.any():  # a direction that died would stay dead
                        row[:] = fresh
            position = 0
            for rest in self._rest:
                length = rest.stop - rest.start
                total[rest] = self._tail[position : position + length]
                position += length
        costs.end(costs.all_reduced(len(self._first) + len(self._second)), len(total))

    def _add_scaled(self, residual: Float32, values: Float32, scale: np.float32) -> None:
        for low in range(0, len(values), BLOCK_ELEMENTS):
            high = min(low + BLOCK_ELEMENTS, len(values))
            scaled = self._scratch[: high - low]
            np.multiply(values[low:high], scale, out=scaled)
            np.add(residual[low:high], scaled, out=residual[low:high])


def _cut(buffer: Float32, rank: int, lengths: list[int]) -> list[Float32]:
    """Views of (rank, length), one behind the other."""
    position, views = 0, []
    for length in lengths:
        views.append(buffer[position : position + rank * length].reshape(rank, length))
        position += rank * length
    return views
