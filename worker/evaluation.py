"""Loss, accuracy and metrics over a whole data set, split among the ranks and exact whatever their number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from protos import job_pb2
from worker.data.batches import BatchReader
from worker.data.preprocessing import Preprocessing
from worker.data.sharding import share
from worker.data.sources import Dataset
from worker.data.stored_array import Progress, unwatched
from worker.engine.model import Model
from worker.measurements import finite_or_none
from worker.metrics import MetricSums, Values
from worker.sync.world import World

MOST_SAMPLES = 512  # that a rank evaluates at a time
MOST_BYTES = 64 * 1024 * 1024  # that their layers' outputs take, unless one sample alone takes more


class Evaluation(NamedTuple):
    """What a model is worth on a data set; the same on every rank."""

    loss: float  # mean over the samples
    accuracy: float | None  # None where that has no meaning
    metrics: Values  # those the job asks for

    def as_report(self) -> dict[str, Any]:
        """The fields of a line of metrics.jsonl; names as in the contract."""
        report = {"validation_loss": self.loss, "validation_accuracy": self.accuracy}
        return report | ({"validation_metrics": self.metrics} if self.metrics else {})


def samples_at_once(model: Model, samples: int) -> int:
    """How many of `samples` to evaluate together: enough to keep calls few, and no more memory than that is worth."""
    affordable = MOST_BYTES // (model.values_per_sample * model.dtype.itemsize)
    return max(1, min(samples, MOST_SAMPLES, affordable))


class Evaluator:
    """Evaluates one data set again and again; its buffers are made once."""

    def __init__(
        self,
        world: World,
        model: Model,
        dataset: Dataset,
        preprocessing: Preprocessing,
        metrics: Sequence[job_pb2.Metric] = (),
        virtual_shards: int = 0,
    ) -> None:
        """With `virtual_shards` the samples are taken in pieces that the number of ranks has no say in."""
        self._world = world
        self._model = model
        self._metrics = metrics
        self._dataset = dataset
        self._low, self._high = share(0, len(dataset), world.rank, world.size)
        self.capacity = samples_at_once(model, self._high - self._low)
        self._pieces = 0
        if virtual_shards:
            self.capacity = samples_at_once(model, -(-len(dataset) // virtual_shards))
            self._pieces = -(-len(dataset) // self.capacity)
        self._reader = BatchReader(dataset, preprocessing, self.capacity)

    def evaluate(self, progress: Progress = unwatched) -> Evaluation:
        """Collective; `progress` is told that this rank goes on."""
        counted = MetricSums(self._metrics, self._model, self._dataset.targets)
        if self._pieces:
            sums = self._sum_pieces(counted, progress)
        else:
            sums = sum_over(self._model, self._reader, self._low, self._high, counted, progress)
            self._world.sum(sums)
        self._world.sum(counted.sums)
        return conclude(sums, len(self._dataset), counted)

    def _sum_pieces(self, counted: MetricSums, progress: Progress) -> np.ndarray:
        """[loss, correct] over all ranks' samples, with the same bits on any number of ranks.

        A piece's sums are its row of a table that is 0 elsewhere, so adding up the ranks' tables rounds nothing.
        """
        rows = np.zeros((self._pieces, 2))
        for piece in range(*share(0, self._pieces, self._world.rank, self._world.size)):
            low = piece * self.capacity
            high = min(low + self.capacity, len(self._dataset))
            rows[piece] = sum_over(self._model, self._reader, low, high, counted, progress)
        self._world.sum(rows)
        sums: np.ndarray = np.add.reduce(rows, axis=0)
        return sums


def sum_over(
    model: Model, reader: BatchReader, low: int, high: int, counted: MetricSums, progress: Progress = unwatched
) -> np.ndarray:
    """[loss, correct] summed over the samples from `low` to `high`, in float64; the metrics' sums go to `counted`."""
    sums = np.zeros(2)
    for first in range(low, high, reader.capacity):
        progress()
        features, targets = reader.take(np.arange(first, min(first + reader.capacity, high)))
        totals = model.forward(features, targets, observe=counted.add)
        sums += totals.loss, totals.correct
    return sums


def conclude(sums: np.ndarray, samples: int, counted: MetricSums) -> Evaluation:
    """From the sums over all samples."""
    loss, correct = (sums / samples).tolist()
    return Evaluation(loss, finite_or_none(correct), counted.values())
