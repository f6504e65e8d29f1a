"""One rank's gradients of its virtual shards, added up in the tree of sync/reduction_tree.py.

Rules: a virtual shard's sums are those of its samples alone, computed in arrays of the same shapes whichever rank
computes it. All shards have as many samples, but for the last ones of a batch, which may have fewer or none.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from protos import job_pb2
from worker.accumulation import Accumulator
from worker.data.ahead import ReaderAhead
from worker.data.batches import BatchReader
from worker.data.sharding import share
from worker.engine.layers.layer import Moment
from worker.engine.model import Model, Totals
from worker.measurements import Meter
from worker.optimizers import CHUNK_ELEMENTS
from worker.sync.exchange import TOTALS, Exchange
from worker.sync.reproducible import ShardBuffers
from worker.sync.world import World

# From a batch's [first, last) in the epoch's order, the run of it that a rank computes.
Share = Callable[[int, int], tuple[int, int]]


class ShardedAccumulator:
    """Computes the virtual shards of one rank, each of up to `samples`, at most `micro_batch` at a time (0: all)."""

    def __init__(
        self,
        model: Model,
        gradient: np.ndarray,
        totals: np.ndarray,
        buffers: ShardBuffers,
        samples: int,
        micro_batch: int,
    ) -> None:
        """`gradient` and `totals` are those the model is attached to."""
        self._shard = Accumulator(model, gradient, samples, micro_batch)
        self.capacity = self._shard.capacity
        self._gradient, self._sums = gradient, totals[len(TOTALS) :]
        self._buffers = buffers
        self._samples = samples

    def share(self, first: int, last: int) -> tuple[int, int]:
        """The run of the batch [first, last) that this rank's shards are."""
        low, high = (first + shard * self._samples for shard in (self._buffers.start, self._buffers.stop))
        return min(low, last), min(high, last)

    def compute(
        self,
        reader: BatchReader | ReaderAhead,
        indices: np.ndarray,
        following: np.ndarray,
        moment: Moment,
        meter: Meter,
    ) -> Totals:
        """Leave the shards' sums in the exchange's buffers, totals too; those returned are 0.

        As Accumulator.compute otherwise.
        """
        rows = self._buffers.rows
        for number in range(len(rows)):
            first, last = number * self._samples, (number + 1) * self._samples
            upcoming = indices[last : last + self._samples] if last < len(indices) else following[: self._samples]
            place = moment._replace(first=moment.first + min(first, len(indices)))
            totals = self._shard.compute(reader, indices[first:last], upcoming, place, meter)
            rows[number, : len(TOTALS)] = 0
            rows[number, :2] = totals.loss, totals.correct
            rows[number, len(TOTALS) :] = self._sums
            self._sums[:] = 0
            self._fold(number)
            meter.lap("backward")
        return Totals(0.0, 0.0, len(indices))

    def _fold(self, number: int) -> None:
        """Add the shard's gradient where it belongs, a piece that stays in cache at a time."""
        slot, adds, merges = self._buffers.folding.folds[number]
        slots = self._buffers.slots
        for start in range(0, len(self._gradient), CHUNK_ELEMENTS):
            here = slice(start, start + CHUNK_ELEMENTS)
            if adds:
                np.add(slots[slot][here], self._gradient[here], out=slots[slot][here])
            else:
                np.copyto(slots[slot][here], self._gradient[here])
            for into, source in merges:
                np.add(slots[into][here], slots[source][here], out=slots[into][here])


def open_accumulator(
    world: World, model: Model, exchange: Exchange, training: job_pb2.Training, batch_size: int
) -> tuple[Accumulator | ShardedAccumulator, Share]:
    """What computes this rank's gradients, and which samples of a batch they are of; `batch_size` is a full batch's."""
    buffers = exchange.shard_buffers
    if buffers is not None:
        samples = shard_samples(batch_size, buffers.shards)
        sharded = ShardedAccumulator(
            model, exchange.gradient, exchange.totals, buffers, samples, training.micro_batch
        )  # fmt: skip
        return sharded, sharded.share
    accumulator = Accumulator(
        model, exchange.gradient, -(-batch_size // world.size), training.micro_batch, exchange.finished
    )
    return accumulator, lambda first, last: share(first, last, world.rank, world.size + exchange.guests)


def shard_samples(batch_size: int, shards: int) -> int:
    """Samples of a virtual shard, in the ragged last batch of an epoch too."""
    return -(-batch_size // shards)
