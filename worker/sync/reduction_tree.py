"""The one binary tree in which the virtual shards of a batch are added up, whoever computed them.

A batch is cut into a fixed number of virtual shards, counted from 0. The tree over them is that of a binary counter:
a subtree covers shards i 2^k to (i + 1) 2^k - 1, cut off at the last shard, and its sum is that of its two halves.
Floating-point addition gives the same bits for a + b as for b + a but not for another grouping, so who adds what when
is free, and the grouping is not: only siblings are ever added.

Rules: pure. Whoever holds some shards merges siblings as far as it can; what is left are maximal subtrees, and merging
those of everyone comes to the same bits as one holder of all would get.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from worker.data.sharding import share


class Subtree(NamedTuple):
    """The sum over virtual shards start to stop - 1."""

    start: int
    stop: int


class Merge(NamedTuple):
    """Add part `source` to part `into`."""

    into: int
    source: int


class Fold(NamedTuple):
    """What becomes of one shard's gradient: it goes to a slot, is added there or written, and slots are merged."""

    slot: int
    adds: bool
    merges: tuple[Merge, ...]


class Folding(NamedTuple):
    """How one holder of consecutive shards works through them."""

    folds: tuple[Fold, ...]  # one for each shard, in order
    subtrees: tuple[Subtree, ...]  # what slots 0, 1, ... hold in the end
    slots: int  # how many are needed on the way


def own_shards(shards: int, rank: int, ranks: int) -> tuple[int, int]:
    """The run [start, stop) of virtual shards that `rank` computes; empty for some where there are more ranks."""
    return share(0, shards, rank, ranks)


def are_siblings(left: Subtree, right: Subtree, shards: int) -> bool:
    """Whether the two are the halves of one subtree."""
    size = left.stop - left.start
    whole = size.bit_count() == 1 and left.start % (2 * size) == 0
    return whole and left.stop == right.start and right.stop == min(left.start + 2 * size, shards)


def fold(start: int, stop: int, shards: int) -> Folding:
    """How the shards from `start` to `stop` - 1 are added up as they come, in as few slots as can be."""
    held: list[Subtree] = []
    folds, slots = [], 0
    for shard in range(start, stop):
        held.append(Subtree(shard, shard + 1))
        adds = len(held) > 1 and are_siblings(held[-2], held[-1], shards)
        merges = []
        while len(held) > 1 and are_siblings(held[-2], held[-1], shards):
            right = held.pop()
            held[-1] = Subtree(held[-1].start, right.stop)
            merges.append(Merge(len(held) - 1, len(held)))
        # A right sibling is added where the left one lies, and takes no slot of its own.
        folds.append(Fold(merges[0].into if adds else len(held) - 1, adds, tuple(merges[adds:])))
        slots = max(slots, folds[-1].slot + 1)
    return Folding(tuple(folds), tuple(held), slots)


def most_slots(shards: int, ranks: int) -> int:
    """The slots that the rank which needs most of them needs; at least 1."""
    return max(1, *(fold(*own_shards(shards, rank, ranks), shards).slots for rank in range(ranks)))


def merge(parts: Sequence[Subtree], shards: int) -> tuple[list[Merge], dict[int, Subtree]]:
    """The merges that bring these parts together as far as they go, and what the parts that remain then are.

    Parts come in any order and share no shard; they are named by their place in the list.
    """
    merges: list[Merge] = []
    held: list[tuple[Subtree, int]] = []
    for part, number in sorted((part, number) for number, part in enumerate(parts)):
        held.append((part, number))
        while len(held) > 1 and are_siblings(held[-2][0], held[-1][0], shards):
            (left, into), (right, source) = held[-2:]
            held[-2:] = [(Subtree(left.start, right.stop), into)]
            merges.append(Merge(into, source))
    return merges, {number: part for part, number in held}


def shard_totals(rows: np.ndarray) -> np.ndarray:
    """The totals (total_count,) over all virtual shards, of each one's (shards, total_count), added in their order."""
    total: np.ndarray = np.zeros(rows.shape[1])
    for row in rows:
        total += row
    return total
