"""From a job's words to a checked data set: built-in data, targets, shapes, and the faults common to all formats."""

import gzip
import re
import struct
import tracemalloc
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from protos import job_pb2
from worker.data.sources import Dataset, open_features, open_source
from worker.errors import DataFault

X = np.arange(12, dtype=np.float32).reshape(4, 3)
Y = np.array([0, 2, 1, 0], np.uint8)


def npz(path: Path, features: np.ndarray, targets: np.ndarray) -> job_pb2.Source:
    np.savez(path / "a.npz", x=features, y=targets)
    return job_pb2.Source(npz=job_pb2.NpzSource(path=str(path / "a.npz")))


def npy(path: Path, features: np.ndarray, targets: np.ndarray) -> job_pb2.Source:
    np.save(path / "x.npy", features)
    np.save(path / "y.npy", targets)
    return job_pb2.Source(npy=job_pb2.NpySource(features=str(path / "x.npy"), targets=str(path / "y.npy")))


def idx(path: Path, images: np.ndarray, labels: np.ndarray) -> job_pb2.Source:
    for name, values in (("images.gz", images), ("labels.gz", labels)):
        header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
        (path / name).write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))
    return job_pb2.Source(idx=job_pb2.IdxSource(images=str(path / "images.gz"), labels=str(path / "labels.gz")))


def test_the_built_in_digits_are_those_of_scikit_learn() -> None:
    dataset, reference = open_source(job_pb2.Source(built_in="digits"), "labels"), load_digits()
    assert (dataset.features.dtype, dataset.features.shape) == (np.uint8, (1797, 8, 8))
    assert (dataset.sample_shape, len(dataset)) == ((8, 8, 1), 1797)
    np.testing.assert_array_equal(dataset.features, reference.images)
    np.testing.assert_array_equal(dataset.targets, reference.target)
    assert dataset.place == "built-in digits"


def test_the_built_in_digits_name_their_source_and_licence() -> None:
    text = (resources.files("worker.data") / "built_in" / "digits.txt").read_text()
    assert all(word in text for word in ("Alpaydin", "Kaynak", "UCI", "CC BY 4.0", "https://doi.org/10.24432/C50P49"))


@pytest.mark.parametrize("make", [npz, npy, idx])
def test_every_format_gives_the_same_data_set(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    images = np.arange(24, dtype=np.uint8).reshape(4, 2, 3)
    dataset: Dataset = open_source(make(tmp_path, images, Y), "labels")
    np.testing.assert_array_equal(dataset.features, images)
    np.testing.assert_array_equal(dataset.targets, Y)
    assert (dataset.features.dtype, dataset.targets.dtype, dataset.rows) == (np.uint8, np.int64, None)
    assert str(tmp_path) in dataset.place


def test_arrays_of_an_archive_can_have_any_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", pixels=X, digit=Y)
    source = job_pb2.NpzSource(path=str(tmp_path / "a.npz"), features="pixels", targets="digit")
    np.testing.assert_array_equal(open_source(job_pb2.Source(npz=source), "labels").features, X)


@pytest.mark.parametrize(
    ("stored", "sample"), [((4,), (1,)), ((4, 3), (3,)), ((4, 2, 3), (2, 3, 1)), ((4, 2, 3, 5), (2, 3, 5))]
)
def test_a_sample_is_a_row_or_an_image_with_its_channels(
    tmp_path: Path, stored: tuple[int, ...], sample: tuple[int, ...]
) -> None:
    dataset = open_source(npy(tmp_path, np.zeros(stored), Y), "labels")
    assert dataset.features.shape == stored
    assert dataset.sample_shape == sample


@pytest.mark.parametrize("stored", ["?", "u1", "i8", "u8", "f2", "f4", "f8", ">f8", ">i4"])
@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_labels_become_int64(tmp_path: Path, stored: str, shape: tuple[int, ...]) -> None:
    labels = np.array([0, 1, 1, 0]).reshape(shape).astype(stored)
    for make in (npy, npz):
        targets = open_source(make(tmp_path, X, labels), "labels").targets
        assert (targets.dtype, targets.tolist()) == (np.int64, [0, 1, 1, 0])


@pytest.mark.parametrize("stored", ["u1", "f4", "f8", ">f4"])
@pytest.mark.parametrize(("shape", "width"), [((4,), 1), ((4, 2), 2), ((4, 2, 3), 6)])
def test_values_become_rows_of_float32(tmp_path: Path, stored: str, shape: tuple[int, ...], width: int) -> None:
    values = np.random.default_rng(0).integers(0, 9, shape).astype(stored)
    targets = open_source(npy(tmp_path, X, values), "values").targets
    assert (targets.dtype, targets.shape) == (np.float32, (4, width))
    assert targets.dtype.isnative
    np.testing.assert_array_equal(targets, values.reshape(4, width))


def changed(values: np.ndarray, index: tuple[int, ...], value: float) -> np.ndarray:
    values = values.copy()
    values[index] = value
    return values


IMAGE = np.zeros((4, 2, 3), np.float64)
FAULTS = {
    "nan": (changed(X, (2, 1), np.nan), Y, r"features at row 2, column 1 \(counted from 0\): nan; every value must be"),
    "infinity": (changed(IMAGE, (1, 0, 2), np.inf), Y, r"features at row 1, column \(0, 2\) \(counted from 0\): inf;"),
    "too large": (changed(IMAGE, (3, 1, 1), -1e39), Y, r"row 3, column \(1, 1\).*: -1e\+39, which float32 cannot hold"),
    "nan alone in a row": (np.array([1, 2, 3, np.nan]), Y, r"features at row 3 \(counted from 0\): nan"),
    "nan label": (X, np.array([0, 1, np.nan, 1]), r"targets at row 2 \(counted from 0\): nan"),
    "fraction": (
        X,
        np.array([0, 1.25, 1, 1]),
        r"label 1\.25 at row 1 \(counted from 0\) is not a whole number; labels are",
    ),
    "negative": (X, np.array([0, 1, 1, -3]), r"label -3 at row 3 \(counted from 0\) is negative; labels are"),
    "large": (X, np.array([0, 1, 1, 2**63], np.uint64), r"label 9223372036854775808 at row 3 .* is too large"),
    "maps of labels": (
        X,
        np.zeros((4, 2, 2)),
        r"one label for each sample or position, .* shape \(4, 2, 2\); give class",
    ),
    "a fraction at a position": (X, np.eye(4) / 2, r"label 0\.5 at row 0, column 0 .* is not a whole number"),
    "counts": (X, Y[:3], r"4 samples but 3 targets; name two that belong together"),
    "no samples": (X[:0], Y[:0], r"holds 0 samples \(shape \(0, 3\)\); at least one is needed"),
    "no targets": (X, Y[:0], r"holds 0 samples \(shape \(0,\)\)"),
    "no features": (X[:, :0], Y, r"features of shape \(4, 0\) have no numbers in a sample"),
    "a number": (np.array(3.0), Y, r"features are a single number without a sample axis"),
    "a number as target": (X, np.array(3), r"targets are a single number without a sample axis"),
    "five axes": (
        np.zeros((4, 1, 1, 1, 1)),
        Y,
        r"features have shape \(4, 1, 1, 1, 1\); a sample is .* at most 4 axes",
    ),
}


@pytest.mark.parametrize("make", [npz, npy])
@pytest.mark.parametrize("kind", FAULTS)
def test_data_that_cannot_be_trained_on_is_one_fault_that_names_the_place(tmp_path: Path, kind: str, make) -> None:  # type: ignore[no-untyped-def]
    features, targets, message = FAULTS[kind]
    with pytest.raises(DataFault) as caught:
        open_source(make(tmp_path, features, targets), "labels")
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert re.search(message, str(caught.value))


def test_images_and_labels_of_different_counts_name_both_files(tmp_path: Path) -> None:
    with pytest.raises(DataFault, match=r"images\.gz with .*labels\.gz: 4 samples but 3 targets; name two that belong"):
        open_source(idx(tmp_path, np.zeros((4, 2, 2)), np.zeros(3)), "labels")


def test_exchanged_images_and_labels_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(DataFault, match=r"shape \(4, 2, 2\).*are features and targets exchanged\?"):
        open_source(idx(tmp_path, np.zeros(4), np.zeros((4, 2, 2))), "labels")


def test_a_fault_deep_in_a_mapped_file_is_found_without_reading_it_whole_into_memory(tmp_path: Path) -> None:
    features = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float32, shape=(8000, 1000))
    features[7777, 123] = np.nan
    features.flush()
    np.save(tmp_path / "y.npy", np.zeros(8000))
    source = job_pb2.NpySource(features=str(tmp_path / "x.npy"), targets=str(tmp_path / "y.npy"))
    tracemalloc.start()
    try:
        with pytest.raises(DataFault, match=r"features at row 7777, column 123 \(counted from 0\): nan"):
            open_source(job_pb2.Source(npy=source), "labels")
        assert tracemalloc.get_traced_memory()[1] < 12_000_000  # of 32 million bytes
    finally:
        tracemalloc.stop()


def test_a_source_without_a_kind_is_a_fault_that_lists_them() -> None:
    with pytest.raises(DataFault, match="names no kind; the kinds are: built_in, idx, npz, npy, csv, parquet, text"):
        open_source(job_pb2.Source(), "labels")


def test_features_alone_are_read_from_every_format(tmp_path: Path) -> None:
    images = np.arange(24, dtype=np.uint8).reshape(4, 2, 3)
    npy(tmp_path, images, Y)
    npz(tmp_path, images, Y)
    idx(tmp_path, images, Y)
    (tmp_path / "a.csv").write_text("a,b\n1,2\n3,4\n")
    for name in ("x.npy", "a.npz", "images.gz"):
        np.testing.assert_array_equal(open_features(str(tmp_path / name)), images)
    np.testing.assert_array_equal(open_features(str(tmp_path / "a.csv")), [[1, 2], [3, 4]])
    np.testing.assert_array_equal(open_features(str(tmp_path / "a.csv"), "a"), [[2], [4]])
    np.testing.assert_array_equal(open_features(str(tmp_path / "a.csv"), "c"), [[1, 2], [3, 4]])


def test_features_alone_are_checked_too(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([[1.0, np.inf]]))
    with pytest.raises(DataFault, match=r"x\.npy: features at row 0, column 1 \(counted from 0\): inf"):
        open_features(str(tmp_path / "x.npy"))
