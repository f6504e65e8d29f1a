"""A slice is cut into buckets, and how large they are is chosen by what a network's times say."""

import itertools
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.sync.between_nodes import Slice, sum_in_order
from worker.sync.bucket_size import AT_ONCE, BUDGET_SECONDS, REPEATS, SIZES_BYTES, best_size, measured_seconds
from worker.sync.buckets import cut

LARGE = 1 << 30


@given(elements=st.integers(0, 300), size=st.integers(1, 400), start=st.integers(0, 50), ranks=st.integers(1, 3))
def test_buckets_cover_the_slice_from_its_end_to_its_front(elements: int, size: int, start: int, ranks: int) -> None:
    total = np.arange(elements, dtype=np.float32)
    gradients = [total + 1000 * (rank + 1) for rank in range(ranks)]
    buckets = cut(Slice(start, gradients, total, Mock()), size)
    stops = [start + elements, *(bucket.start for bucket in buckets)]
    assert [bucket.total.size for bucket in buckets] == [stop - low for stop, low in itertools.pairwise(stops)]
    assert stops[-1] == start
    for bucket in buckets:
        assert 0 < bucket.total.size <= size
        for rank, gradient in enumerate(bucket.gradients):
            np.testing.assert_array_equal(gradient, bucket.total + 1000 * (rank + 1))


@given(parts=st.integers(1, 5), cut_at=st.integers(0, 40))
def test_a_sum_has_the_same_bits_however_it_is_cut(parts: int, cut_at: int) -> None:
    vectors = list(np.random.default_rng(parts).standard_normal((parts, 40)).astype(np.float32))
    whole, pieces = np.empty(40, np.float32), np.empty(40, np.float32)
    sum_in_order(vectors, whole)
    for piece in (slice(0, cut_at), slice(cut_at, 40)):
        sum_in_order([vector[piece] for vector in vectors], pieces[piece])
    np.testing.assert_array_equal(whole, pieces)
    np.testing.assert_allclose(whole, np.sum(vectors, axis=0, dtype=np.float64), rtol=1e-5, atol=1e-5)


class Network:
    """Buckets of a size take `latency_seconds` and their bytes; counts what was asked of it."""

    def __init__(self, latency_seconds: float, bytes_per_second: float) -> None:
        self.latency_seconds, self.bytes_per_second, self.spent = latency_seconds, bytes_per_second, 0.0

    def seconds(self, size: int) -> float:
        seconds = AT_ONCE * (self.latency_seconds + size / self.bytes_per_second)
        self.spent += seconds
        return seconds


@pytest.mark.parametrize(
    ("latency_seconds", "bytes_per_second", "chosen"),
    [
        (1e-7, 1e10, 64 << 10),  # latency is nothing: the smallest does
        (1e-5, 1e9, 64 << 10),
        (1e-4, 2e9, 1 << 20),  # latency as long as 200 KB take
        (1e-3, 1e8, 1 << 20),  # 100 KB; the budget ends before 4 MB
        (1e-4, 12.5e6, 64 << 10),  # 100 Mbit/s
    ],
)
def test_the_size_is_the_smallest_that_uses_the_network_well(latency_seconds, bytes_per_second, chosen) -> None:
    network = Network(latency_seconds, bytes_per_second)
    measured = measured_seconds(network.seconds, LARGE)
    assert best_size(measured, LARGE) == chosen


@given(latency_seconds=st.floats(0, 0.05), bytes_per_second=st.floats(1e7, 1e11), largest=st.integers(1, LARGE))
def test_measuring_ends_in_time_and_leads_to_a_size(latency_seconds, bytes_per_second, largest) -> None:
    network = Network(latency_seconds, bytes_per_second)
    measured = measured_seconds(network.seconds, largest)
    assert network.spent <= 2 * BUDGET_SECONDS
    assert best_size(measured, largest) in (*SIZES_BYTES, largest)
    assert all(size <= largest for size in measured)


def test_the_fastest_of_several_times_counts() -> None:
    times = itertools.chain([0.01, *[1e-4] * (REPEATS - 1)], itertools.repeat(2e-3))
    assert measured_seconds(lambda size: next(times), SIZES_BYTES[1])[SIZES_BYTES[0]] == 1e-4


def test_a_slice_smaller_than_any_size_is_one_bucket() -> None:
    assert best_size(measured_seconds(Network(1e-5, 1e9).seconds, 1000), 1000) == 1000
