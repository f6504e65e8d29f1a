"""Binary cross-entropy of logits, each output a yes or no of its own."""

from typing import Any

import numpy as np
import numpy.typing as npt

from protos import job_pb2
from worker.engine import functions
from worker.engine.losses.loss import Totals, check_values, require_row
from worker.engine.params import FloatArray, Shape
from worker.errors import DataFault


class BinaryCrossEntropy:
    """L = -sum_j (y_j log s_j + (1 - y_j) log(1 - s_j)) for each sample; s = sigmoid(z) of the logits z, y in 0..1.

    -log s = log(1 + e^-z) and -log(1 - s) = z + log(1 + e^-z), so L_j = (1 - y) z + log(1 + e^-z). For z < 0, where
    e^-z may overflow, log(1 + e^-z) = -z + log(1 + e^z) gives L_j = -y z + log(1 + e^z). Both at once:
    L_j = |z| |[z > 0] - y| + log(1 + e^-|z|): a sum of terms that are never negative, so no digits cancel.
    """

    def __init__(self, options: job_pb2.BinaryCrossEntropyLoss, output_shape: Shape) -> None:
        """ModelFault unless outputs are one row."""
        self.units = require_row(output_shape)

    def reserve(self, batch_size: int, dtype: npt.DTypeLike, in_place: bool) -> None:
        """Room for delta unless it may lie in the outputs, and for three intermediate arrays."""
        shape = (batch_size, self.units)
        self.buffer = None if in_place else np.empty(shape, dtype)
        self.scratch = np.empty((3, *shape), dtype)
        self.positive = np.empty(shape, np.bool_)

    def forward(self, outputs: FloatArray, targets: npt.NDArray[Any]) -> Totals:
        """The loss, and delta = s - y, from one e^.

        dL_j/dz = (1 - y) - e^-z / (1 + e^-z) = (1 - y) - (1 - s) = s - y. With e = e^-|z|, s is 1/(1 + e) where z > 0
        and e/(1 + e) elsewhere: max([z > 0], e) / (1 + e), since 0 < e <= 1.

        An output is right when z > 0 just where y >= 1/2; with k outputs each counts 1/k of a label.
        """
        n = len(outputs)
        magnitude, exponential, terms = self.scratch[:, :n]
        positive = np.greater(outputs, 0, out=self.positive[:n])
        correct = np.count_nonzero(positive == (targets >= 0.5)) / self.units

        np.abs(outputs, out=magnitude)
        np.exp(np.negative(magnitude, out=exponential), out=exponential)
        np.abs(np.subtract(positive, targets, out=terms), out=terms)
        np.multiply(terms, magnitude, out=terms)
        loss = float(np.add.reduce(terms, axis=None, dtype=np.float64))
        loss += float(np.add.reduce(np.log1p(exponential, out=terms), axis=None, dtype=np.float64))

        self.delta: FloatArray = outputs if self.buffer is None else self.buffer[:n]
        np.maximum(positive, exponential, out=self.delta)
        np.add(exponential, 1, out=exponential)
        np.divide(self.delta, exponential, out=self.delta)
        np.subtract(self.delta, targets, out=self.delta)
        return Totals(loss, correct, n)

    def backward(self) -> FloatArray:
        """s - y; the derivation is at forward."""
        return self.delta

    def predict(self, outputs: FloatArray) -> None:
        """Probabilities: sigmoid of the logits."""
        functions.sigmoid(outputs, out=outputs)

    def check_targets(self, targets: npt.NDArray[Any], place: str, first: int = 0) -> None:
        """Values from 0 to 1, as many as outputs."""
        check_values(targets, self.units, place, first)
        outside = ((targets < 0) | (targets > 1)).any(axis=1)
        if outside.any():
            row = int(np.argmax(outside))
            raise DataFault(
                f"{place}: sample {first + row} has a target outside 0 to 1, which binary_cross_entropy needs"
            )
