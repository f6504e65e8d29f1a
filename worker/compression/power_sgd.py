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
from collections.abc import Sequence
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
    """Make the rows of (rank, n) orthonormal in place, by Gram-Schmidt in float64, twice; one that depends on others
    becomes zeros."""
    rows = factor.astype(np.float64)
    for index, row in enumerate(rows):
        length = math.sqrt(float(np.sum(row * row)))
        for _ in range(2):
            for other in rows[:index]:
                row -= float(np.sum(row * other)) * other
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
