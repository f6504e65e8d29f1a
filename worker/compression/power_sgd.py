"""PowerSGD: a gradient matrix as the product of two narrow ones, by one step of power iteration (Vogels et al. 2019).

    P = orthonormal columns of M Q,   Q <- M^T P,   M' = P Q^T

for M of n x m and Q of m x r: P and Q have r (n + m) numbers in place of n m. Both products are linear in M, so the sum
over the nodes of M Q and of M^T P is that of the summed M: factors can be all-reduced as they are. Q is kept for the
next step (the warm start), with which the iteration comes near the best rank-r approximation, the truncated SVD. M' is
the projection of M on the span of P, so |M - M'| <= |M|.

Rules: factors are held transposed, (r, n) and (r, m), so that a column is contiguous. What every node must find alike
(`orthonormalize`, `product`) is made of elementwise operations and sums of NumPy's own in a fixed order, without BLAS,
whose order of adding depends on the processor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from worker.compression.codec import BLOCK_ELEMENTS, Float32
from worker.engine.params import ParameterSlot

NEGLIGIBLE = 1e-6  # of a column's length: what is left of it after projection is rounding


class Matrix(NamedTuple):
    """Rows of one parameter's gradient, where they lie in the slice."""

    start: int
    rows: int
    columns: int

    @property
    def stop(self) -> int:
        """Behind the last element."""
        return self.start + self.rows * self.columns


def matrices_within(slots: Sequence[ParameterSlot], bounds: tuple[int, int], rank: int) -> list[Matrix]:
    """Of every parameter of two dimensions or more, the whole rows in the slice, where factors are the fewer numbers.

    More than two dimensions are two where the matrix is nearest to a square.
    """
    start, stop = bounds
    found = []
    for slot in slots:
        if len(slot.shape) < 2:
            continue
        splits = [(math.prod(slot.shape[:axis]), math.prod(slot.shape[axis:])) for axis in range(1, len(slot.shape))]
        rows, columns = min(splits, key=sum)
        first = max(0, -(-(start - slot.offset) // columns))
        last = min(rows, (stop - slot.offset) // columns)
        if last > first and rank * (last - first + columns) < (last - first) * columns:
            found.append(Matrix(slot.offset + first * columns - start, last - first, columns))
    return found


def first_factor(matrix: Matrix, rank: int) -> Float32:
    """Q^T, (rank, columns), to begin with: the same on every node."""
    random = np.random.default_rng([matrix.rows, matrix.columns, rank])
    return random.standard_normal((rank, matrix.columns)).astype(np.float32)


def orthonormalize(factor: Float32) -> None:
    """Make the rows of (rank, n) orthonormal in place, by Gram-Schmidt in float64; one that depends on others becomes
    zeros.

    The classical kind, all rows before at once, and twice, which is enough (Giraud et al. 2005).
    """
    rows = factor.astype(np.float64)
    for index, row in enumerate(rows):
        others, length = rows[:index], math.sqrt(float(np.sum(row * row)))
        for _ in range(2 if index else 0):
            along = np.sum(others * row, axis=1)
            row -= np.sum(others * along[:, np.newaxis], axis=0)
        left = math.sqrt(float(np.sum(row * row)))
        if left <= NEGLIGIBLE * length:  # false for nan, which is not hidden
            row[:] = 0
        else:
            row /= left
    factor[:] = rows


def product(left: Float32, right: Float32, out: Float32, scratch: Float32) -> None:
    """out = left^T right, of (rank, n) and (rank, m) to (n, m); `scratch` as long as BLOCK_ELEMENTS or m at least."""
    columns = right.shape[1]
    height = max(1, BLOCK_ELEMENTS // columns)
    for first in range(0, len(out), height):
        block = out[first : first + height]
        term = scratch[: block.size].reshape(block.shape)
        np.multiply(left[0, first : first + height, None], right[0], out=block)
        for index in range(1, len(left)):
            np.multiply(left[index, first : first + height, None], right[index], out=term)
            np.add(block, term, out=block)


class Factors:
    """A slice's matrices on their way through a step: what travels is `first`, then `second`, summed over the nodes.

    `begin`, sum `first`, `turn`, sum `second`, `end`. What is no matrix rides with the first factors as it is. Each
    node keeps of its own matrix what its projection on the common columns leaves, M - P (M^T P)^T: the residuals' sum
    is what the sum lost.

    Attributes:
        first: (elements,) float32, P of every matrix, then what is no matrix.
        second: (elements,) float32, Q of every matrix; between two steps what the next one begins with.
        residual: (elements of the slice,) float32, what this node has yet to send, in units of the mean gradient.
    """

    def __init__(self, slots: Sequence[ParameterSlot], bounds: tuple[int, int], rank: int) -> None:
        elements = bounds[1] - bounds[0]
        self.residual = np.zeros(elements, np.float32)
        self._matrices = matrices = matrices_within(slots, bounds, rank)
        self._rest = _between(matrices, elements)
        self._residuals = [self.residual[m.start : m.stop].reshape(m.rows, m.columns) for m in matrices]
        lengths = factor_lengths(matrices, elements, rank)
        self.first, self.second = np.empty(lengths[0], np.float32), np.empty(lengths[1], np.float32)
        self._left = _cut(self.first, rank, [m.rows for m in matrices])
        self._right = _cut(self.second, rank, [m.columns for m in matrices])
        self._starts = [first_factor(matrix, rank) for matrix in matrices]
        for factor, start in zip(self._right, self._starts, strict=True):
            factor[:] = start
        self._scratch = np.empty(max([BLOCK_ELEMENTS, *(m.columns for m in matrices)]), np.float32)
        self._lost = np.empty(max([0, *(m.rows * m.columns for m in matrices)]), np.float32)

    def begin(self, total: Float32, samples: int) -> None:
        """From this node's sum of the gradient over its samples of the `samples` of all; M Q is left in `first`."""
        scale = np.float32(1 / samples)
        for matrix, left, right, own in zip(self._matrices, self._left, self._right, self._residuals, strict=True):
            self._add_scaled(own.reshape(-1), total[matrix.start : matrix.stop], scale)
            np.matmul(right, own.T, out=left)
        for rest, tail in self._in_tail():
            tail[:] = total[rest]

    def turn(self) -> None:
        """The common columns are known: M^T P is left in `second`, and what is lost in the residual."""
        for left, right, own in zip(self._left, self._right, self._residuals, strict=True):
            orthonormalize(left)
            np.matmul(left, own, out=right)
            lost = self._lost[: own.size].reshape(own.shape)
            np.matmul(left.T, right, out=lost)
            np.subtract(own, lost, out=own)

    def end(self, total: Float32, samples: int) -> None:
        """Fill `total` with the sum over all nodes."""
        for matrix, left, right, start in zip(self._matrices, self._left, self._right, self._starts, strict=True):
            part = total[matrix.start : matrix.stop]
            product(left, right, part.reshape(matrix.rows, matrix.columns), self._scratch)
            np.multiply(part, np.float32(samples), out=part)
            for row, fresh in zip(right, start, strict=True):
                if not row.any():  # a direction that died would stay dead
                    row[:] = fresh
        for rest, tail in self._in_tail():
            total[rest] = tail

    def _in_tail(self) -> Iterator[tuple[slice, Float32]]:
        """What is no matrix: where it lies in the slice, and where in `first`."""
        position = self.first.size
        for rest in reversed(self._rest):
            position, stop = position - (rest.stop - rest.start), position
            yield rest, self.first[position:stop]

    def _add_scaled(self, residual: Float32, values: Float32, scale: np.float32) -> None:
        for low in range(0, len(values), BLOCK_ELEMENTS):
            high = min(low + BLOCK_ELEMENTS, len(values))
            scaled = self._scratch[: high - low]
            np.multiply(values[low:high], scale, out=scaled)
            np.add(residual[low:high], scaled, out=residual[low:high])


def factor_lengths(matrices: Sequence[Matrix], elements: int, rank: int) -> tuple[int, int]:
    """How many numbers travel first and second, of a slice of so many elements."""
    rest = elements - sum(m.rows * m.columns for m in matrices)
    return rank * sum(m.rows for m in matrices) + rest, rank * sum(m.columns for m in matrices)


def _between(matrices: Sequence[Matrix], elements: int) -> list[slice]:
    """What of the slice is in no matrix."""
    edges = [0, *(edge for matrix in matrices for edge in (matrix.start, matrix.stop)), elements]
    return [slice(a, b) for a, b in list(pairwise(edges))[::2] if a < b]


def _cut(buffer: Float32, rank: int, lengths: Sequence[int]) -> list[Float32]:
    """Views of (rank, length), one behind the other."""
    position, views = 0, []
    for length in lengths:
        views.append(buffer[position : position + rank * length].reshape(rank, length))
        position += rank * length
    return views
