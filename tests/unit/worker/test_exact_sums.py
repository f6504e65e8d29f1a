"""Sums of squares: the same bits however the vector is cut at blocks."""

import itertools
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.exact_sums import BLOCK_ELEMENTS, block_bounds, exact_totals, pieces, square_sums

ELEMENTS = 5 * BLOCK_ELEMENTS + 17
VECTOR = (np.random.default_rng(1).standard_normal(ELEMENTS) * 10.0 ** np.linspace(-3, 3, ELEMENTS)).astype(np.float32)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.lists(st.integers(0, ELEMENTS), min_size=1, max_size=6, unique=True))
def test_any_slices_give_the_sums_of_the_whole_vector(slices: int, edges: list[int]) -> None:
    edges = sorted([0, ELEMENTS, *edges])
    ranges = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=False) if a < b]
    of = pieces(ranges)
    together = exact_totals(square_sums(VECTOR, 0, of), of, len(ranges))
    parts = [
        square_sums(VECTOR[start:stop], start, [piece for piece in of if start <= piece.start < stop])
        for start, stop in block_bounds(ELEMENTS, slices)
    ]
    assert exact_totals(np.concatenate(parts), of, len(ranges)) == together
    expected = [float((VECTOR[a:b].astype(np.float64) ** 2).sum()) for a, b in ranges]
    np.testing.assert_allclose(together, expected, rtol=1e-12)


@given(st.integers(1, 10**6), st.integers(1, 40))
def test_slices_begin_at_blocks_and_cover_the_vector(elements: int, slices: int) -> None:
    bounds = block_bounds(elements, slices)
    assert len(bounds) == slices
    assert [bounds[0][0], bounds[-1][1]] == [0, elements]
    assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))
    assert all(start % BLOCK_ELEMENTS == 0 or start == elements for start, _ in bounds)


def test_pieces_are_cut_where_blocks_begin() -> None:
    found = pieces([(3, BLOCK_ELEMENTS), (BLOCK_ELEMENTS + 1, 3 * BLOCK_ELEMENTS), (ELEMENTS - 1, ELEMENTS)])
    lengths = [(piece.owner, piece.stop - piece.start) for piece in found]
    assert lengths == [(0, BLOCK_ELEMENTS - 3), (1, BLOCK_ELEMENTS - 1), (1, BLOCK_ELEMENTS), (2, 1)]
    assert math.isclose(sum(exact_totals(np.ones(4), found, 3)), 4)
