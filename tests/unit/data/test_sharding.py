"""Sample order, batches and shares: properties that hold for every seed, size and number of ranks."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.data.sharding import batch_bounds, permutation, sample_order, share, steps_per_epoch

SEEDS = st.integers(0, 2**63 - 1)
EPOCHS = st.integers(0, 10_000)
SAMPLES = st.integers(1, 500)
BATCH_SIZES = st.integers(0, 600)
WORLDS = st.integers(1, 40)


@given(seed=SEEDS, epoch=EPOCHS, samples=SAMPLES)
def test_order_is_a_permutation_whatever_the_seed_and_epoch(seed: int, epoch: int, samples: int) -> None:
    order = sample_order(seed, epoch, samples)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(samples))


@given(seed=SEEDS, epoch=EPOCHS, samples=SAMPLES, batch_size=BATCH_SIZES, world=WORLDS)
def test_every_number_of_ranks_reads_the_same_batches_and_each_sample_once(
    seed: int, epoch: int, samples: int, batch_size: int, world: int
) -> None:
    order = sample_order(seed, epoch, samples)
    read = []
    for step in range(steps_per_epoch(samples, batch_size)):
        start, stop = batch_bounds(step, samples, batch_size)
        shares = [share(start, stop, rank, world) for rank in range(world)]
        batch = np.concatenate([order[a:b] for a, b in shares])
        np.testing.assert_array_equal(batch, order[start:stop])
        read.append(batch)
    np.testing.assert_array_equal(np.concatenate(read), order)


@given(start=st.integers(0, 10**12), size=st.integers(0, 10**6), world=st.integers(1, 300))
def test_shares_follow_each_other_and_differ_by_at_most_one_sample(start: int, size: int, world: int) -> None:
    shares = [share(start, start + size, rank, world) for rank in range(world)]
    assert shares[0][0] == start
    assert shares[-1][1] == start + size
    assert all(before[1] == after[0] for before, after in itertools.pairwise(shares))
    sizes = [stop - begin for begin, stop in shares]
    assert max(sizes) - min(sizes) <= 1


@given(samples=SAMPLES, batch_size=st.integers(1, 600))
def test_only_the_last_batch_is_ragged(samples: int, batch_size: int) -> None:
    bounds = [batch_bounds(step, samples, batch_size) for step in range(steps_per_epoch(samples, batch_size))]
    sizes = [stop - start for start, stop in bounds]
    assert all(size == batch_size for size in sizes[:-1])
    assert 1 <= sizes[-1] <= batch_size
    assert sum(sizes) == samples


def test_a_batch_size_of_0_takes_all_samples_in_one_step() -> None:
    assert steps_per_epoch(7, 0) == 1
    assert batch_bounds(0, 7, 0) == (0, 7)


def test_a_step_past_the_epoch_is_refused() -> None:
    with pytest.raises(IndexError, match="step 3 of an epoch of 3 steps"):
        batch_bounds(3, 7, 3)


def test_some_ranks_have_no_samples_when_the_batch_is_smaller_than_the_world() -> None:
    sizes = [stop - start for start, stop in (share(10, 12, rank, 5) for rank in range(5))]
    assert sorted(sizes) == [0, 0, 0, 1, 1]


def test_orders_differ_between_epochs_seeds_and_purposes() -> None:
    orders = [sample_order(seed, epoch, 1000) for seed in range(4) for epoch in range(4)]
    orders += [permutation(1000, seed, 1) for seed in range(4)]
    assert len({order.tobytes() for order in orders}) == len(orders)


def test_orders_never_change_between_versions_and_machines() -> None:
    # Written down once: a checkpoint resumed by a later release must see the rest of the same epoch.
    assert sample_order(0, 0, 10).tolist() == [9, 7, 2, 0, 4, 3, 5, 6, 1, 8]
    assert sample_order(7, 3, 10).tolist() == [8, 4, 9, 3, 6, 1, 5, 2, 7, 0]


def test_every_position_is_as_likely_for_every_sample() -> None:
    samples, epochs = 10, 4000
    counts = np.zeros((samples, samples))
    for epoch in range(epochs):
        counts[np.arange(samples), sample_order(1, epoch, samples)] += 1
    expected = epochs / samples
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 136  # (samples - 1)^2 = 81 degrees of freedom: exceeded by chance 1 time in 10,000


def test_a_fresh_process_draws_the_same_order() -> None:
    program = "from worker.data.sharding import sample_order; print(sample_order(5, 2, 1797).tolist())"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert printed.stdout.strip() == str(sample_order(5, 2, 1797).tolist())
