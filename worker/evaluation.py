"""Loss and accuracy over a whole data set, split among the ranks and exact whatever their number."""

from __future__ import annotations

import numpy as np

from worker.data.batches import BatchReader
from worker.data.preprocessing import Preprocessing
from worker.data.sharding import share
from worker.data.sources import Dataset
from worker.engine.model import Model
from worker.measurements import finite_or_none
from worker.sync.world import World

BATCH = 512  # samples a rank evaluates at a time


class Evaluator:
    """Evaluates one data set again and again; its buffers are made once."""

    def __init__(self, world: World, model: Model, dataset: Dataset, preprocessing: Preprocessing) -> None:
        self._world = world
        self._model = model
        self._samples = len(dataset)
        self._low, self._high = share(0, len(dataset), world.rank, world.size)
        self.capacity = min(BATCH, max(self._high - self._low, 1))
        self._reader = BatchReader(dataset, preprocessing, self.capacity)

    def evaluate(self) -> tuple[float, float | None]:
        """Mean loss and accuracy (None where that has no meaning); the same on every rank. Collective."""
        sums = sum_over(self._model, self._reader, self._low, self._high)
        self._world.sum(sums)
        loss, correct = (sums / self._samples).tolist()
        return loss, finite_or_none(correct)


def sum_over(model: Model, reader: BatchReader, low: int, high: int) -> np.ndarray:
    """[loss, correct] summed over the samples from `low` to `high`, in float64."""
    sums = np.zeros(2)
    for first in range(low, high, reader.capacity):
        features, targets = reader.take(np.arange(first, min(first + reader.capacity, high)))
        totals = model.forward(features, targets)
        sums += totals.loss, totals.correct
    return sums
