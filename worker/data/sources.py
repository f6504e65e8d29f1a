"""Data sources: from what a job file names to arrays that training reads.

Rules: features stay in their stored type and are converted a batch at a time; targets come in the form the loss takes.
Every value is checked here, once, before the first step. A lone channel is implied: images stored as (n, 28, 28) have
samples of shape (28, 28, 1), unless the model's layers make sequences of them.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protos import job_pb2
from worker.data.idx import read_idx
from worker.data.numpy_files import read_npy, read_npz
from worker.data.parquet import read_parquet, read_parquet_features
from worker.data.stored_array import Progress, StoredArray, check_finite, check_numbers, is_mapped, unwatched
from worker.data.stores import localized, with_urls
from worker.data.table import read_csv, read_csv_features
from worker.data.targets import as_targets
from worker.data.text import read_text
from worker.errors import DataFault


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples and their targets; a view of some of the rows where `rows` says which."""

    features: NDArray[Any]  # (N, ...) in the stored type; may be memory-mapped
    targets: NDArray[Any]  # int64 (N,) or float32 (N, k); of text uint8 (N, context), which a reader hands out as int64
    rows: NDArray[np.int64] | None  # (n,) indices into both, or None for all
    place: str  # the files, for messages
    lone_channel: bool = True  # samples stored with two axes are images of one channel, not (time, features)

    def __len__(self) -> int:
        return len(self.features) if self.rows is None else len(self.rows)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return sample_shape(self.features, self.lone_channel)

    @property
    def is_mapped(self) -> bool:
        """Features or targets are read from a memory-mapped file."""
        return is_mapped(self.features) or is_mapped(self.targets)


def sample_shape(features: NDArray[Any], lone_channel: bool = True) -> tuple[int, ...]:
    """(k,), or for images (height, width, channels), of stored features (n,), (n, k), (n, h, w) or (n, h, w, c).

    Without a `lone_channel` (n, h, w) are sequences (time, features) and stay as they are.
    """
    inner = features.shape[1:]
    if len(inner) == 2 and lone_channel:
        return (*inner, 1)
    return inner or (1,)


def open_source(source: job_pb2.Source, target_kind: str, progress: Progress = unwatched) -> Dataset:
    """The data set a job names, checked; DataFault naming file, value and remedy.

    target_kind: "labels" for targets int64 (n,), "values" for float32 (n, k). Text has labels for each byte of a
    sample: uint8 (n, context).
    """
    local, urls = localized(source)
    if not urls:
        return _open_local(source, target_kind, progress)
    try:
        dataset = _open_local(local, target_kind, progress)
    except DataFault as fault:
        raise DataFault(with_urls(str(fault), urls)) from fault
    return replace(dataset, place=with_urls(dataset.place, urls))


def _open_local(source: job_pb2.Source, target_kind: str, progress: Progress) -> Dataset:
    kind = source.WhichOneof("kind")
    if kind is None:
        raise DataFault(f"data source: names no kind; the kinds are: {', '.join(OPENERS)}")
    try:
        features, targets = OPENERS[kind](getattr(source, kind))
        if kind == "text":  # bytes are whole, finite and labels as they are
            return _text_dataset(features, targets, target_kind)
        _check_features(features, progress)
        place = _both(features.place, targets.place)
        check_numbers(targets, "targets")
        samples, answers = len(features.values), len(targets.values)
        if samples != answers:
            raise DataFault(f"{place}: {samples} samples but {answers} targets; name two that belong together")
        return Dataset(features.values, as_targets(targets, target_kind, progress), None, place)
    except MemoryError as error:
        raise DataFault(
            f"data source {kind}: does not fit in memory ({error}); store it as npy, which is memory-mapped"
        ) from error


def open_features(path: str, target: str = "") -> NDArray[Any]:
    """Features alone, as `predict` takes them.

    .npy, .npz (array `x`), .csv and .parquet (every column, but for one of the name `target`), or idx, plain or .gz.
    """
    suffix = path[path.rfind(".") :].lower()
    readers: dict[str, Callable[[str], StoredArray]] = {
        ".npy": read_npy,
        ".npz": lambda path: read_npz(path, "x")[0],
        ".csv": lambda path: read_csv_features(path, target),
        ".parquet": lambda path: read_parquet_features(path, target),
    }
    array = readers.get(suffix, read_idx)(path)
    _check_features(array)
    return array.values


def _check_features(array: StoredArray, progress: Progress = unwatched) -> None:
    check_numbers(array, "features")
    if array.values.ndim > 4:
        raise DataFault(
            f"{array.place}: features have shape {array.values.shape}; "
            "a sample is (features,) or (height, width, channels): reshape the array to at most 4 axes"
        )
    check_finite(array, "features", progress)


def _text_dataset(features: StoredArray, targets: StoredArray, target_kind: str) -> Dataset:
    if target_kind != "labels":
        raise DataFault(f"{features.place}: a text gives labels, but the loss takes values; use softmax_cross_entropy")
    return Dataset(features.values, targets.values, None, features.place)


def _both(features: str, targets: str) -> str:
    return features if features == targets else f"{features} with {targets}"


def _open_built_in(name: str) -> tuple[StoredArray, StoredArray]:
    features, targets = read_npz(os.path.join(os.path.dirname(__file__), "built_in", f"{name}.npz"), "x", "y")
    place = f"built-in {name}"
    return features._replace(place=place), targets._replace(place=place)


def _open_idx(source: job_pb2.IdxSource) -> tuple[StoredArray, StoredArray]:
    return read_idx(source.images), read_idx(source.labels)


def _open_npz(source: job_pb2.NpzSource) -> tuple[StoredArray, StoredArray]:
    features, targets = read_npz(source.path, source.features or "x", source.targets or "y")
    return features, targets


def _open_npy(source: job_pb2.NpySource) -> tuple[StoredArray, StoredArray]:
    return read_npy(source.features), read_npy(source.targets)


def _open_csv(source: job_pb2.CsvSource) -> tuple[StoredArray, StoredArray]:
    return read_csv(source.path, source.target)


def _open_parquet(source: job_pb2.ParquetSource) -> tuple[StoredArray, StoredArray]:
    return read_parquet(source.path, source.target)


def _open_text(source: job_pb2.TextSource) -> tuple[StoredArray, StoredArray]:
    return read_text(source.path, source.context)


OPENERS: dict[str, Callable[[Any], tuple[StoredArray, StoredArray]]] = {
    "built_in": _open_built_in,
    "idx": _open_idx,
    "npz": _open_npz,
    "npy": _open_npy,
    "csv": _open_csv,
    "parquet": _open_parquet,
    "text": _open_text,
}
