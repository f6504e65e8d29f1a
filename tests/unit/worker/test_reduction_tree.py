"""The tree of virtual shards: any holders, in any order, come to the bits of one holder of all."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.sync.reduction_tree import Subtree, fold, merge, most_slots, own_shards, shard_totals


def leaves(shards: int) -> np.ndarray:
    """Sizes far apart, so that another grouping gives other bits."""
    random = np.random.default_rng(shards)
    return (random.standard_normal((shards, 50)) * 10.0 ** random.integers(-4, 4, (shards, 1))).astype(np.float32)


def tree_sum(values: np.ndarray, start: int, size: int) -> np.ndarray:
    """The definition: a subtree of `size`, a power of two, is the sum of its halves; beyond the end is nothing."""
    if size == 1:
        return values[start]
    half = size // 2
    left = tree_sum(values, start, half)
    return left + tree_sum(values, start + half, half) if start + half < len(values) else left


def whole(values: np.ndarray) -> np.ndarray:
    return tree_sum(values, 0, 1 << (len(values) - 1).bit_length())


def folded(values: np.ndarray, start: int, stop: int) -> list[tuple[Subtree, np.ndarray]]:
    """What a holder of these shards has in its slots, by the steps it takes."""
    folding = fold(start, stop, len(values))
    slots = np.full((folding.slots, values.shape[1]), np.nan, np.float32)
    for shard, (slot, adds, merges) in zip(range(start, stop), folding.folds, strict=True):
        slots[slot] = slots[slot] + values[shard] if adds else values[shard]
        for into, source in merges:
            slots[into] += slots[source]
    return list(zip(folding.subtrees, slots, strict=False))


def merged(parts: list[tuple[Subtree, np.ndarray]], shards: int) -> list[tuple[Subtree, np.ndarray]]:
    merges, remaining = merge([subtree for subtree, _ in parts], shards)
    sums = [values.copy() for _, values in parts]
    for into, source in merges:
        sums[into] += sums[source]
    return [(subtree, sums[number]) for number, subtree in remaining.items()]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_split_over_ranks_and_nodes_gives_the_bits_of_one_holder(data: st.DataObject) -> None:
    shards = data.draw(st.integers(1, 40))
    values = leaves(shards)
    cuts = sorted(data.draw(st.lists(st.integers(0, shards), max_size=9)))
    nodes: dict[int, list[tuple[Subtree, np.ndarray]]] = {}
    for start, stop in itertools.pairwise([0, *cuts, shards]):
        nodes.setdefault(data.draw(st.integers(0, 3)), []).extend(folded(values, start, stop))
    between = [part for parts in nodes.values() for part in merged(data.draw(st.permutations(parts)), shards)]
    ((subtree, total),) = merged(data.draw(st.permutations(between)), shards)
    assert subtree == (0, shards)
    np.testing.assert_array_equal(total, whole(values))


@given(st.integers(1, 200), st.integers(1, 70))
def test_ranks_share_the_shards_in_few_slots(shards: int, ranks: int) -> None:
    runs = [own_shards(shards, rank, ranks) for rank in range(ranks)]
    assert [shard for run in runs for shard in range(*run)] == list(range(shards))
    depth = most_slots(shards, ranks)
    assert 1 <= depth <= 2 * shards.bit_length()
    assert all(len(fold(*run, shards).subtrees) <= fold(*run, shards).slots <= depth for run in runs)


def test_another_grouping_would_give_other_bits() -> None:
    assert not np.array_equal(whole(leaves(8)), leaves(8).sum(axis=0))


def test_one_rank_of_eight_shards_needs_three_slots_and_two_ranks_two() -> None:
    assert [most_slots(8, ranks) for ranks in (1, 2, 3, 4, 7, 8, 16)] == [3, 2, 2, 1, 1, 1, 1]


def test_totals_are_added_in_the_order_of_the_shards() -> None:
    rows = np.array([[1e16, 1.0], [1.0, 2.0], [-1e16, 3.0]])
    assert shard_totals(rows).tolist() == [0.0, 6.0]
