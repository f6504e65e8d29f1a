"""One rank's gradient of one batch, computed in pieces that fit its memory.

Rules: sums, not means, so the pieces' gradients add up to the share's, whatever its size. A rank without samples
computes a gradient of zeros. The gradient is finished only in the last piece's backward pass, which then tells from
which element on.
"""

from __future__ import annotations

import numpy as np

from worker.data.ahead import ReaderAhead
from worker.data.batches import BatchReader
from worker.engine.layers.layer import Finished, Moment
from worker.engine.model import Model, Totals
from worker.measurements import Meter


class Accumulator:
    """Computes shares of up to `share` samples, at most `micro_batch` at a time (0: the whole share).

    `finished` is told, while the last backward pass runs, from which element on `gradient` is finished.
    """

    def __init__(
        self, model: Model, gradient: np.ndarray, share: int, micro_batch: int, finished: Finished | None = None
    ) -> None:
        self.capacity = min(share, micro_batch or share)
        self._model = model
        self._gradient = gradient
        self._sum = np.empty_like(gradient) if self.capacity < share else gradient
        self._finished = finished
        self._added_from = gradient.size  # from where on the last piece's gradient has the other pieces' sum in it

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
            # It writes `gradient` anew.
            if first != pieces[-1]:
                self._model.backward()
                if first:
                    np.add(self._gradient, self._sum, out=self._sum)
                else:
                    np.copyto(self._sum, self._gradient)
            elif first:
                self._added_from = self._gradient.size
                self._model.backward(self._add_pieces)
            else:
                self._model.backward(self._finished)
            meter.lap("backward")
            loss, correct, samples = loss + totals.loss, correct + totals.correct, samples + totals.samples
        return Totals(loss, correct, samples)

    def _add_pieces(self, first: int) -> None:
        """The last piece's gradient is finished from here on: make it that of all pieces."""
        behind = slice(first, self._added_from)
        np.add(self._gradient[behind], self._sum[behind], out=self._gradient[behind])
        self._added_from = first
        if self._finished is not None:
            self._finished(first)
