"""Reading ahead: the next batch is prepared by a thread while this one is computed with.

Rules: the same batches to the bit, for a reader of the same kind prepares them, in buffers of its own. What the thread
meets is raised by the `take` of the very batch. One batch ahead, not more. Waiting for the thread is part of a step,
which the rank's watchdog bounds.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from worker.data.augmentation import Augmentation
from worker.data.batches import BatchReader
from worker.data.preprocessing import Preprocessing
from worker.data.sources import Dataset

if TYPE_CHECKING:
    from concurrent.futures import Future

WORTH_BYTES = 4 << 20  # of a batch as it is stored


def is_worth_a_thread(batch_bytes: int, cores: int, ranks: int) -> bool:
    """Whether reading ahead pays: the batch is large, and this machine has a core that no rank computes on.

    Handing a batch over costs 10 to 100 microseconds, and the two threads take turns at Python's lock: with batches of
    32 x 64 numbers a small network lost a third of its rate. Batches of 32 x 224 x 224 x 3 bytes, augmented, take
    2.5 of 8.7 ms to prepare, in copies that hold no lock. On one core a second thread was 5 to 40 % slower at any size.
    """
    return batch_bytes >= WORTH_BYTES and cores > ranks


def open_reader(
    dataset: Dataset,
    preprocessing: Preprocessing,
    capacity: int,
    augmentation: Augmentation | None,
    ranks: int,
) -> BatchReader | ReaderAhead:
    """A reader of training batches, the faster kind; `ranks` share this machine."""
    batch_bytes = capacity * math.prod(dataset.features.shape[1:]) * dataset.features.itemsize

    def make() -> BatchReader:
        return BatchReader(dataset, preprocessing, capacity, augmentation=augmentation)

    if is_worth_a_thread(batch_bytes, len(os.sched_getaffinity(0)), ranks):
        return ReaderAhead(make(), make())
    return make()


class _Prepared(NamedTuple):
    indices: NDArray[np.int64]
    batch: Future[tuple[NDArray[Any], NDArray[Any]]]


class ReaderAhead:
    """Two readers of the same data set, taking turns: what one has handed out stays while the other prepares."""

    def __init__(self, reader: BatchReader, twin: BatchReader) -> None:
        from concurrent.futures import ThreadPoolExecutor  # milliseconds that most jobs have no use for

        self.capacity = reader.capacity
        self._readers = reader, twin
        self._turn = 0
        self._thread = ThreadPoolExecutor(1, "next-batch")
        self._prepared: _Prepared | None = None

    def begin_epoch(self, epoch: int) -> None:
        """As of BatchReader; what was prepared before it is of another epoch and dropped."""
        self._drop()
        for reader in self._readers:
            reader.begin_epoch(epoch)

    def take(self, indices: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
        """As of BatchReader; views that a `prepare` after the next `take` overwrites, and the next `take` but one."""
        self._turn = 1 - self._turn
        prepared = self._prepared
        if prepared is not None and np.array_equal(prepared.indices, indices):
            self._prepared = None
            return prepared.batch.result()
        self._drop()
        return self._readers[self._turn].take(indices)

    def prepare(self, indices: NDArray[np.int64]) -> None:
        """Begin with the batch that is taken next; the one taken last stays as it is."""
        self._drop()
        twin = self._readers[1 - self._turn]
        self._prepared = _Prepared(indices, self._thread.submit(twin.take, indices))

    def close(self) -> None:
        """End the thread, once it is done with what it is at; it also ends when the reader is no longer referenced."""
        self._prepared = None
        self._thread.shutdown()

    def _drop(self) -> None:
        """Wait until the thread writes nothing more; what it met is of a batch nobody takes."""
        if self._prepared is not None:
            self._prepared.batch.exception()
            self._prepared = None
