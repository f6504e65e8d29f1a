"""Sums in the middle of a step: right on every rank, to the same bits, through shared memory and between nodes."""

from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("programs") / "reduction.py"


# (ranks, ranks a node): alone; shared memory; every rank a node; two nodes of two; unequal nodes of two and one.
@pytest.mark.parametrize(("ranks", "ranks_per_node"), [(1, 0), (2, 0), (3, 0), (5, 0), (3, 1), (4, 2), (3, 2)])
def test_every_sum_is_right_and_the_same_everywhere(run_ranks, ranks, ranks_per_node) -> None:
    done = run_ranks(ranks, [PROGRAM, ranks_per_node, 0])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("free_bytes", [1, 40_000])  # never room; room for the first vectors, not for the longest
def test_where_shared_memory_is_too_small_mpi_takes_over(run_ranks, free_bytes) -> None:
    done = run_ranks(3, [PROGRAM, 0, free_bytes])
    assert done.returncode == 0, done.stdout + done.stderr
