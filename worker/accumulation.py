"""One rank's gradient of one batch, computed in pieces that fit its memory.

Rules: sums, not means, so the pieces' gradients add up to the share's, whatever its size. A rank without samples
computes a gradient of zeros.
"""

from __future__ import annotations

import numpy as np

from worker.data.ahead import ReaderAhead
from worker.data.batches import BatchReader
from worker.engine.layers.layer import Moment
from worker.engine.model import Model, Totals
from worker.measurements import Meter


class Accumulator:
    """Computes shares of up to `share` samples, at most `micro_batch` at a time (0: the whole share)."""

    def __init__(self, model: Model, gradient: np.ndarray, share: int, micro_batch: int) -> None:
        self.capacity = min(share, micro_batch or share)
        self._model = model
        self._gradient = gradient
        self._sum = np.empty_like(gradient) if self.capacity < share else gradient

    def compute(
        self,
        reader: BatchReader | ReaderAhead,
        indices: np.ndarray,
        following: np.ndarray,
        moment: Moment,
        meter: Meter,
    ) -> Totals:
        """Fill `gradient` with the sum over the samples at `indices`; returns the sums of the forward passes.

        `moment` is that of the whole share; a piece's own tells where in the batch the piece begins, so that random
        choices do not depend on the pieces. `following` are the indices of the next share, empty when there is none.
        """
        loss, correct, samples = 0.0, 0.0, 0
        pieces = range(0, max(1, len(indices)), self.capacity)
        for first in pieces:
            features, targets = reader.take(indices[first : first + self.capacity])
            upcoming = following if first == pieces[-1] else indices[first + self.capacity :]
            if len(upcoming):
                reader.prepare(upcoming[: self.capacity])
            meter.lap("data")
            totals = self._model.forward(features, targets, moment._replace(first=moment.first + first))
            meter.lap("forward")
            self._model.backward()  # writes `gradient` anew
            if first:
                np.add(self._gradient, self._sum, out=self._gradient)
            if first != pieces[-1]:
                np.copyto(self._sum, self._gradient)
            meter.lap("backward")
            loss, correct, samples = loss + totals.loss, correct + totals.correct, samples + totals.samples
        return Totals(loss, correct, samples)
