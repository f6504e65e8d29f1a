"""Sums of squares with the same bits however the vector is cut among ranks and servers.

Rules: a square sum is taken over blocks that begin at fixed places of the flat vector, each by one whoever holds it,
and the blocks' sums are added by `math.fsum`, which rounds once, whatever their order. Slices begin at blocks.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from worker.clipping import sum_of_squares
from worker.optimizers import FloatArray, Ranges

# Below the 10,000 elements from which OpenBLAS gives a scalar product to several threads, which changes its bits.
BLOCK_ELEMENTS: Final = 1 << 13


class Piece(NamedTuple):
    """The part of one range of the flat vector that lies in one block."""

    owner: int  # which range
    start: int
    stop: int


def pieces(ranges: Ranges) -> list[Piece]:
    """The ranges cut where blocks begin."""
    found: list[Piece] = []
    for owner, (first, last) in enumerate(ranges):
        edges = [first, *range((first // BLOCK_ELEMENTS + 1) * BLOCK_ELEMENTS, last, BLOCK_ELEMENTS), last]
        found += (Piece(owner, start, stop) for start, stop in itertools.pairwise(edges))
    return found


def block_bounds(elements: int, slices: int) -> list[tuple[int, int]]:
    """Cut `elements` into `slices` runs of nearly equal length that begin at blocks; some may be empty."""
    blocks = -(-elements // BLOCK_ELEMENTS)
    edges = [min(elements, blocks * index // slices * BLOCK_ELEMENTS) for index in range(slices + 1)]
    return list(itertools.pairwise(edges))


def square_sums(vector: FloatArray, first: int, chosen: Iterable[Piece]) -> npt.NDArray[np.float64]:
    """Of each piece; `vector` holds the flat vector from element `first` on."""
    return np.array([sum_of_squares(vector[piece.start - first : piece.stop - first]) for piece in chosen])


def exact_totals(sums: Sequence[float] | npt.NDArray[np.float64], of: Sequence[Piece], owners: int) -> list[float]:
    """The pieces' sums added up for each range."""
    by_owner: list[list[float]] = [[] for _ in range(owners)]
    for value, piece in zip(sums, of, strict=True):
        by_owner[piece.owner].append(float(value))
    return [math.fsum(values) for values in by_owner]
