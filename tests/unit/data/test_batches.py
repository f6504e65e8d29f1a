"""Batches against plain indexing, for every stored type and layout, in buffers made once."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.data.batches import BatchReader
from worker.data.preprocessing import Preprocessing
from worker.data.sources import Dataset

RANDOM = np.random.default_rng(0)
LABELS = np.arange(50) % 10


@pytest.mark.parametrize("stored", ["?", "u1", "i1", "u2", "i4", "i8", "f2", "f4", "f8", ">f4", ">i2"])
@pytest.mark.parametrize("shape", [(50,), (50, 6), (50, 3, 4), (50, 3, 4, 2)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_batch_equals_indexing_and_scaling(stored: str, shape: tuple[int, ...], dtype: type) -> None:
    features = RANDOM.integers(0, 100, shape).astype(stored)
    dataset = Dataset(features, LABELS, None, "here")
    reader = BatchReader(dataset, Preprocessing(scale=0.5), 20, dtype)
    for indices in (np.array([3, 3, 49, 0]), RANDOM.permutation(50)[:20], np.array([], np.int64)):
        batch, targets = reader.take(indices)
        assert batch.dtype == dtype
        assert batch.shape == (len(indices), *dataset.sample_shape)
        np.testing.assert_array_equal(batch.reshape(features[indices].shape), features[indices].astype(dtype) / 2)
        np.testing.assert_array_equal(targets, LABELS[indices])


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_view_is_read_by_its_own_row_numbers(data: st.DataObject) -> None:
    rows = np.array(data.draw(st.lists(st.integers(0, 49), min_size=1, max_size=30)))
    indices = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=30)), np.int64)
    values = RANDOM.random((50, 2), dtype=np.float32)
    dataset = Dataset(RANDOM.random((50, 7), dtype=np.float32), values, rows, "here")
    features, targets = BatchReader(dataset, Preprocessing(), 30).take(indices)
    np.testing.assert_array_equal(features, dataset.features[rows[indices]])
    np.testing.assert_array_equal(targets, values[rows[indices]])


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_memory_mapped_file_is_read_in_either_layout(tmp_path: Path, order: str) -> None:
    features = RANDOM.random((50, 3, 4)).astype(np.float32, order=order)
    np.save(tmp_path / "x.npy", features)
    mapped = np.asarray(np.load(tmp_path / "x.npy", mmap_mode="r"))
    assert mapped.flags.c_contiguous == (order == "C")
    indices = RANDOM.permutation(50)[:9]
    batch, _ = BatchReader(Dataset(mapped, LABELS, None, "here"), Preprocessing(), 9).take(indices)
    np.testing.assert_array_equal(batch[..., 0], features[indices])


@pytest.mark.parametrize("stored", [np.uint8, np.float32])
def test_a_batch_of_0_samples_of_a_standardized_set_works(stored: type) -> None:
    dataset = Dataset(np.ones((50, 2), stored), LABELS, None, "here")
    reader = BatchReader(dataset, Preprocessing(mean=(1.0, 1.0), deviation=(2.0, 2.0)), 4)
    features, targets = reader.take(np.array([], np.int64))
    assert features.shape == (0, 2)
    assert targets.shape == (0,)


def test_batches_share_buffers_made_once() -> None:
    images = RANDOM.integers(0, 256, (500, 28, 28), dtype=np.uint8)
    dataset = Dataset(images, np.zeros(500, np.int64), None, "here")
    for preprocessing in (Preprocessing(1 / 255), Preprocessing(mean=(1.0,) * 784, deviation=(2.0,) * 784)):
        reader = BatchReader(dataset, preprocessing, 256)
        order = RANDOM.permutation(500)
        first, _ = reader.take(order[:256])
        tracemalloc.start()
        try:
            second, _ = reader.take(order[244:])
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert np.shares_memory(first, second)
        assert peak_bytes < 100_000  # NumPy converts through 64 KB of its own; the batch has 803,000 bytes


@pytest.mark.parametrize("index", [50, -51])
@pytest.mark.parametrize("rows", [None, np.arange(50)])
def test_an_index_outside_the_data_set_is_refused(index: int, rows: np.ndarray | None) -> None:
    reader = BatchReader(Dataset(np.zeros((50, 2), np.uint8), LABELS, rows, "here"), Preprocessing(), 4)
    with pytest.raises(IndexError):
        reader.take(np.array([index]))


def test_more_samples_than_the_capacity_are_refused() -> None:
    reader = BatchReader(Dataset(np.zeros((50, 2), np.uint8), LABELS, None, "here"), Preprocessing(), 4)
    with pytest.raises(IndexError, match="a batch of 5 samples was asked of a reader with room for 4"):
        reader.take(np.arange(5))
