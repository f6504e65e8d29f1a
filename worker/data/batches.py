"""Batches: rows gathered and converted into buffers made once.

Rules: on the path of every step, so nothing big is allocated after construction. What `take` returns are views that
the next `take` overwrites.
"""

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from worker.data.augmentation import Augmentation, Augmenter
from worker.data.preprocessing import Preprocessing
from worker.data.sources import Dataset


class BatchReader:
    """Reads batches of at most `capacity` samples of a data set: augmented, preprocessed, as floats of `dtype`."""

    def __init__(
        self,
        dataset: Dataset,
        preprocessing: Preprocessing,
        capacity: int,
        dtype: DTypeLike = np.float32,
        augmentation: Augmentation | None = None,
    ) -> None:
        self.capacity = capacity
        self._stored = dataset.features
        self._stored_targets = dataset.targets
        self._rows = dataset.rows
        self._preprocessing = preprocessing
        self._features = np.empty((capacity, *dataset.sample_shape), dtype)
        targets_shape = (capacity, *dataset.targets.shape[1:])
        self._raw_targets = np.empty(targets_shape, dataset.targets.dtype)
        # Labels stored in a smaller type, as the bytes of a text are, become int64 here.
        is_converted = dataset.targets.dtype.kind in "iu" and dataset.targets.dtype != np.int64
        self._targets = np.empty(targets_shape, np.int64) if is_converted else self._raw_targets
        stored_shape = (capacity, *dataset.features.shape[1:])
        # Rows already of the right type are gathered where they will be used.
        self._in_place = in_place = self._stored.dtype == self._features.dtype
        self._raw = self._features.reshape(stored_shape) if in_place else np.empty(stored_shape, self._stored.dtype)
        # np.take copies the whole array first when it is not laid out row by row, as a memory-mapped file may not be.
        self._in_rows = self._stored.flags.c_contiguous and self._stored.flags.aligned
        self._augmenter = Augmenter(augmentation, stored_shape[1:], self._raw.dtype) if augmentation else None
        self._epoch = 0

    def begin_epoch(self, epoch: int) -> None:
        """What is taken from here on is of this epoch, counted from 0: augmentation goes by it."""
        self._epoch = epoch

    def prepare(self, indices: NDArray[np.int64]) -> None:
        """What is taken next; nothing is done about it here, see ahead.py."""

    def close(self) -> None:
        """Nothing was opened."""

    def take(self, indices: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Features (n, *sample_shape) and targets of the samples at `indices`, 0 <= n <= capacity.

        Targets are (n,), (n, k) or, of text, (n, context). Both are views that the next call overwrites. IndexError
        when an index is outside the data set.
        """
        count = len(indices)
        if count > len(self._features):
            raise IndexError(f"a batch of {count} samples was asked of a reader with room for {len(self._features)}")
        features, targets, raw = self._features[:count], self._targets[:count], self._raw[:count]
        rows = indices if self._rows is None else self._rows.take(indices)
        # The targets, few bytes, are gathered with the bounds check; it makes a copy that the features are spared.
        raw_targets = self._raw_targets[:count]
        self._stored_targets.take(rows, axis=0, out=raw_targets)
        if self._targets is not self._raw_targets:
            np.copyto(targets, raw_targets)
        if self._in_rows:
            self._stored.take(rows, axis=0, out=raw, mode="wrap")
        else:
            raw[...] = self._stored[rows]
        if self._augmenter:
            self._augmenter.apply(raw, self._epoch, indices)
        self._preprocessing.apply(features if self._in_place else raw, features)
        return features, targets
