"""The flat vector is cut into slices for the ranks of a node."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from worker.sync.all_reduce import CACHE_LINE_ELEMENTS, slice_bounds
from worker.sync.server_opening import shard_parts


@given(elements=st.integers(0, 100_000), slices=st.integers(1, 70))
def test_slices_cover_the_vector_in_order_without_overlap(elements: int, slices: int) -> None:
    bounds = slice_bounds(elements, slices)
    assert len(bounds) == slices
    assert bounds[0][0] == 0
    assert bounds[-1][1] == elements
    assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(bounds))


@given(elements=st.integers(0, 100_000), slices=st.integers(1, 70))
def test_slices_begin_on_cache_lines_and_differ_by_two_lines_at_most(elements: int, slices: int) -> None:
    bounds = slice_bounds(elements, slices)
    assert all(start % CACHE_LINE_ELEMENTS == 0 or start == elements for start, _ in bounds)
    lengths = [stop - start for start, stop in bounds]
    assert max(lengths) - min(lengths) <= 2 * CACHE_LINE_ELEMENTS


@given(elements=st.integers(1, 100_000), servers=st.integers(1, 64))
def test_no_shard_is_empty_and_there_are_as_many_as_asked_for_where_the_model_is_large_enough(
    elements: int, servers: int
) -> None:
    parts = shard_parts(elements, servers)
    assert all(start < stop for start, stop in parts)
    assert (parts[0][0], parts[-1][1]) == (0, elements)
    assert len(parts) == servers or len(parts) == -(-elements // CACHE_LINE_ELEMENTS) < servers
