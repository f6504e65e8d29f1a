"""The losses, under the names the job file gives them: those of the oneof in `Loss` of protos/job.proto.

Rules: a loss is a sum over samples and so is its gradient; the exchange divides both by the m of the whole batch, which
makes them the means of the seed document. `forward` finds the loss and delta^[L] = dL/d(outputs) together, since they
share their exponentials; `backward` hands delta over. The cross-entropies take logits, never probabilities.
"""

from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from protos import job_pb2
from worker.engine import functions
from worker.engine.params import FloatArray, Shape
from worker.errors import DataFault, ModelFault

# What a data source has to deliver as targets: "labels" are int64 (n,), "values" are float32 (n, k).
TARGET_KIND: Final[dict[str, str]] = {
    "mean_squared_error": "values",
    "softmax_cross_entropy": "labels",
    "binary_cross_entropy": "values",
}


class Totals(NamedTuple):
    """Sums over the samples of one call."""

    loss: float  # of the loss of each sample
    correct: float  # labels the model got right; nan where there are none to get right (mean_squared_error)
    samples: int


class Loss(Protocol):
    """One loss; outputs are (n, k), what the last layer returned."""

    def __init__(self, options: Any, output_shape: Shape) -> None: ...

    def reserve(self, batch_size: int, dtype: npt.DTypeLike, in_place: bool) -> None:
        """Make the buffers for up to `batch_size` samples. `in_place`: delta may be written over the outputs."""

    def forward(self, outputs: FloatArray, targets: npt.NDArray[Any]) -> Totals:
        """The totals of n >= 1 samples; keeps delta."""

    def backward(self) -> FloatArray:
        """delta^[L] (n, k) of the last forward, which the caller may write over."""

    def predict(self, outputs: FloatArray) -> None:
        """Turn outputs into what a person wants to see, in place: probabilities for the cross-entropies."""

    def check_targets(self, targets: npt.NDArray[Any], place: str) -> None:
        """DataFault when some target cannot belong to these outputs."""


def require_row(output_shape: Shape) -> int:
    """Number of values the model puts out for a sample; ModelFault unless they are one row."""
    if len(output_shape) != 1:
        raise ModelFault(f"got outputs of shape {output_shape}, needs one row of values: end with a dense layer")
    return output_shape[0]


def check_values(targets: npt.NDArray[Any], units: int, place: str) -> None:
    """DataFault unless targets are finite values (n, units)."""
    if targets.ndim != 2 or targets.shape[1] != units:
        got = targets.shape[1] if targets.ndim == 2 else f"shape {targets.shape[1:]}"
        raise DataFault(f"{place}: {got} target values a sample, but the model has {units} outputs")
    if not np.isfinite(targets).all():
        row = int(np.argmin(np.isfinite(targets).all(axis=1)))
        raise DataFault(f"{place}: the target of sample {row} is not a finite number")


class MeanSquaredError:
    """L = 1/(2m) sum (y - yhat)^2 (seed document, "Compute Loss"): 1/2 sum_j (y_j - yhat_j)^2 for each sample."""

    def __init__(self, options: job_pb2.MeanSquaredErrorLoss, output_shape: Shape) -> None:
        """ModelFault unless outputs are one row."""
        self.units = require_row(output_shape)

    def reserve(self, batch_size: int, dtype: npt.DTypeLike, in_place: bool) -> None:
        """Room for delta unless it may lie in the outputs, and for its squares."""
        self.buffer = None if in_place else np.empty((batch_size, self.units), dtype)
        self.squares = np.empty((batch_size, self.units), dtype)

    def forward(self, outputs: FloatArray, targets: npt.NDArray[Any]) -> Totals:
        """delta = yhat - y, and half the sum of its squares."""
        n = len(outputs)
        self.delta: FloatArray = outputs if self.buffer is None else self.buffer[:n]
        np.subtract(outputs, targets, out=self.delta)
        squares = np.multiply(self.delta, self.delta, out=self.squares[:n])
        return Totals(0.5 * float(np.add.reduce(squares, axis=None, dtype=np.float64)), np.nan, n)

    def backward(self) -> FloatArray:
        """dL/dyhat_j = yhat_j - y_j: the factor (yhat - y) of the seed document's delta^[L]."""
        return self.delta

    def predict(self, outputs: FloatArray) -> None:
        """The outputs are the prediction."""

    def check_targets(self, targets: npt.NDArray[Any], place: str) -> None:
        """Finite values, as many as outputs."""
        check_values(targets, self.units, place)


class SoftmaxCrossEntropy:
    """L = -log p_y for each sample, with p = softmax(z) of the logits z and y the label.

    log p_y = z_y - log sum_j e^z_j, and with c = max_j z_j
    L = log sum_j e^(z_j - c) - (z_y - c): no e^ overflows, no log meets 0, whatever the size of z.
    """

    def __init__(self, options: job_pb2.SoftmaxCrossEntropyLoss, output_shape: Shape) -> None:
        """ModelFault unless outputs are one row of two values or more."""
        self.units = require_row(output_shape)
        if self.units < 2:
            raise ModelFault("got 1 output, needs one for each class: use binary_cross_entropy for yes or no")

    def reserve(self, batch_size: int, dtype: npt.DTypeLike, in_place: bool) -> None:
        """Room for delta unless it may lie in the outputs; where each row begins in the flat outputs."""
        self.buffer = None if in_place else np.empty((batch_size, self.units), dtype)
        self.row_starts = np.arange(0, batch_size * self.units, self.units)
        self.ones = np.ones(self.units, dtype)
        self.sums = np.empty(batch_size, dtype)

    def forward(self, outputs: FloatArray, targets: npt.NDArray[Any]) -> Totals:
        """The loss, and delta = p - [j = y], from one e^.

        dL/dz_j = e^z_j / sum_i e^z_i - [j = y] = p_j - [j = y]: the Jacobian of softmax cancels against the derivative
        of the logarithm, which is why the seed document's table says "used with cross-entropy loss".

        The row's maximum is read where argmax found it (needed anyway to count right labels) and row sums are a
        product with ones: NumPy's reductions along a short axis take several times as long.
        """
        n = len(outputs)
        starts = self.row_starts[:n]
        label_at = starts + targets
        predicted = outputs.argmax(axis=1)
        correct = np.count_nonzero(predicted == targets)

        delta: FloatArray = outputs if self.buffer is None else self.buffer[:n]
        np.subtract(outputs, outputs.take(starts + predicted)[:, np.newaxis], out=delta)
        flat = delta.reshape(-1)
        right_logits = float(np.add.reduce(flat.take(label_at), dtype=np.float64))
        np.exp(delta, out=delta)
        sums = np.dot(delta, self.ones, out=self.sums[:n])
        loss = float(np.add.reduce(np.log(sums), dtype=np.float64)) - right_logits

        np.divide(delta, sums[:, np.newaxis], out=delta)
        flat[label_at] -= 1
        self.delta = delta
        return Totals(loss, float(correct), n)

    def backward(self) -> FloatArray:
        """p - [j = y]; the derivation is at forward."""
        return self.delta

    def predict(self, outputs: FloatArray) -> None:
        """Probabilities: softmax of the logits."""
        functions.softmax(outputs, out=outputs)

    def check_targets(self, targets: npt.NDArray[Any], place: str) -> None:
        """Whole numbers from 0 to units - 1."""
        if targets.ndim != 1 or not np.issubdtype(targets.dtype, np.integer):
            raise DataFault(f"{place}: targets are {targets.dtype} of shape {targets.shape}, needs one label a sample")
        outside = (targets < 0) | (targets >= self.units)
        if outside.any():
            row = int(np.argmax(outside))
            raise DataFault(
                f"{place}: label {targets[row]} of sample {row} is not among 0 to {self.units - 1},"
                f" the {self.units} outputs of the model: give the last dense layer more units or correct the label"
            )


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

    def check_targets(self, targets: npt.NDArray[Any], place: str) -> None:
        """Values from 0 to 1, as many as outputs."""
        check_values(targets, self.units, place)
        outside = ((targets < 0) | (targets > 1)).any(axis=1)
        if outside.any():
            row = int(np.argmax(outside))
            raise DataFault(f"{place}: sample {row} has a target outside 0 to 1, which binary_cross_entropy needs")


LOSSES: Final[dict[str, type[Loss]]] = {
    "mean_squared_error": MeanSquaredError,
    "softmax_cross_entropy": SoftmaxCrossEntropy,
    "binary_cross_entropy": BinaryCrossEntropy,
}
