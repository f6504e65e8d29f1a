"""Reading ahead gives what reading in turn gives, to the bit; its faults come where they belong."""

import threading
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from worker.data import ahead
from worker.data.ahead import ReaderAhead, is_worth_a_thread, open_reader
from worker.data.augmentation import Augmentation
from worker.data.batches import BatchReader
from worker.data.preprocessing import Preprocessing
from worker.data.sources import Dataset

RANDOM = np.random.default_rng(0)
DATASET = Dataset(RANDOM.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8), np.arange(60), None, "here")
WHAT = Augmentation(3, False, True, 1, 2)


def make(capacity: int = 16) -> BatchReader:
    return BatchReader(DATASET, Preprocessing(1 / 255), capacity, augmentation=WHAT)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_batches_are_the_same_to_the_bit_whatever_was_prepared(data: st.DataObject) -> None:
    batch = st.lists(st.integers(0, 59), max_size=16).map(lambda indices: np.array(indices, np.int64))
    epochs = data.draw(st.lists(st.lists(batch, min_size=1, max_size=6), max_size=3))
    plain, reader = make(), ReaderAhead(make(), make())
    for epoch, batches in enumerate(epochs):
        plain.begin_epoch(epoch)
        reader.begin_epoch(epoch)
        for this, following in pairwise([*batches, batches[0]]):
            features, targets = reader.take(this)
            if data.draw(st.booleans()):  # also something else than what is then taken
                reader.prepare(following if data.draw(st.booleans()) else this[::-1])
            expected_features, expected_targets = plain.take(this)
            np.testing.assert_array_equal(features, expected_features)
            np.testing.assert_array_equal(targets, expected_targets)
    reader.close()


def test_a_batch_stays_while_the_next_is_prepared() -> None:
    reader = ReaderAhead(make(), make())
    for start in range(0, 48, 16):
        features, _ = reader.take(np.arange(start, start + 16))
        kept = features.copy()
        reader.prepare(np.arange(start + 12, start + 28))
        reader.take(np.arange(start + 12, start + 28))
        np.testing.assert_array_equal(features, kept)
    reader.close()


class Damaged(BatchReader):
    """Its third sample cannot be read."""

    def take(self, indices: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
        if 2 in indices:
            raise IndexError("sample 2")
        return super().take(indices)


def test_a_fault_of_the_thread_is_raised_by_the_take_of_its_batch_alone() -> None:
    reader = ReaderAhead(*(Damaged(DATASET, Preprocessing(), 4) for _ in range(2)))
    reader.take(np.array([0, 1]))
    reader.prepare(np.array([2, 3]))
    with pytest.raises(IndexError, match="sample 2"):
        reader.take(np.array([2, 3]))
    reader.prepare(np.array([2, 3]))
    features, _ = reader.take(np.array([4, 5]))  # what was prepared is not wanted, nor is its fault
    np.testing.assert_array_equal(features, DATASET.features[4:6])
    reader.close()


def test_the_thread_ends_when_the_reader_is_closed() -> None:
    reader = ReaderAhead(make(), make())
    reader.prepare(np.arange(4))
    assert any(thread.name.startswith("next-batch") for thread in threading.enumerate())
    reader.close()
    assert not any(thread.name.startswith("next-batch") for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("batch_bytes", "cores", "ranks", "worth"),
    [(32 * 784, 8, 1, False), (32 * 150_528, 2, 1, True), (32 * 150_528, 2, 2, False), (32 * 150_528, 1, 1, False)],
)
def test_large_batches_are_read_ahead_where_a_core_is_free(
    batch_bytes: int, cores: int, ranks: int, worth: bool
) -> None:
    assert is_worth_a_thread(batch_bytes, cores, ranks) == worth


def test_the_reader_is_the_kind_that_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead.os, "sched_getaffinity", lambda _: {0, 1})
    assert isinstance(open_reader(DATASET, Preprocessing(), 16, WHAT, 1), BatchReader)
    monkeypatch.setattr(ahead, "WORTH_BYTES", 16 * 192)
    reader = open_reader(DATASET, Preprocessing(), 16, WHAT, 1)
    assert isinstance(reader, ReaderAhead)
    reader.close()
    assert isinstance(open_reader(DATASET, Preprocessing(), 15, WHAT, 1), BatchReader)
