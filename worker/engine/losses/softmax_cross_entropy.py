"""Softmax cross-entropy of logits with integer labels: one label a sample, or one for each position of a sequence."""

from typing import Any

import numpy as np
import numpy.typing as npt

from protos import job_pb2
from worker.engine import functions
from worker.engine.losses.loss import Totals
from worker.engine.params import FloatArray, Shape
from worker.errors import DataFault, ModelFault


class SoftmaxCrossEntropy:
    """L = -sum_j q_j log p_j for each sample, with p = softmax(z) of the k logits z and y the label.

    Plainly q_j = [j = y]. With label smoothing e and class weights w, as PyTorch's cross_entropy has it under
    reduction="sum": q_j = w_j ((1 - e) [j = y] + e / k).

    log p_j = z_j - log sum_i e^z_i, and with c = max_i z_i, Q = sum_j q_j
    L = Q log sum_i e^(z_i - c) - sum_j q_j (z_j - c): no e^ overflows, no log meets 0, whatever the size of z.

    The divisor. PyTorch's reduction="mean" divides by the sum of the weights of the labels in the batch, which makes a
    sample's pull depend on the others it happens to meet. Here, as in Keras, a weighted loss is divided by the number
    of samples like any other: exact over ranks, and the same gradient a sample gives in a batch of any make-up. A mean
    of PyTorch's is this one times samples / (sum of weights of the labels); weights that average 1 over the data keep
    the learning rate's meaning.

    Over sequences, outputs (n, T, k) with labels (n, T), a sample's loss is the mean over its T positions, and so is
    its count of right labels: loss and accuracy are those of a position.
    """

    def __init__(self, options: job_pb2.SoftmaxCrossEntropyLoss, output_shape: Shape) -> None:
        """ModelFault unless outputs are one row, or one for each position, of two values or more, or weights misfit."""
        if len(output_shape) not in (1, 2):
            raise ModelFault(
                f"got outputs of shape {output_shape}, needs one row of values, or (positions, values): "
                "end with a dense layer"
            )
        self.units = output_shape[-1]
        self.positions = output_shape[0] if len(output_shape) == 2 else None
        if self.units < 2:
            raise ModelFault("got 1 output, needs one for each class: use binary_cross_entropy for yes or no")
        weights = list(options.class_weights)
        if weights and len(weights) != self.units:
            raise ModelFault(
                f"class_weights: are {len(weights)}, but the model has {self.units} outputs: give each one"
            )
        if weights and not any(weights):
            raise ModelFault("class_weights: are all 0, so that nothing would be learned: give one above 0")
        smoothing = options.label_smoothing
        self.plain = smoothing == 0 and not weights
        # q_j is spread_j, and at the label at_label_j more; Q is their sum for each label.
        by_class = np.array(weights) if weights else np.ones(self.units)
        self.spread = by_class * (smoothing / self.units)
        self.at_label = by_class * (1 - smoothing)

    def reserve(self, batch_size: int, dtype: npt.DTypeLike, in_place: bool) -> None:
        """Room for delta unless it may lie in the outputs; where each row begins in the flat outputs."""
        rows = batch_size * (self.positions or 1)
        self.buffer = None if in_place else np.empty((rows, self.units), dtype)
        self.row_starts = np.arange(0, rows * self.units, self.units)
        self.ones = np.ones(self.units, dtype)
        self.sums = np.empty(rows, dtype)
        self.spread_row = self.spread.astype(dtype)
        self.label_table = self.at_label.astype(dtype)
        self.total_table = (self.at_label + self.spread.sum()).astype(dtype)

    def forward(self, outputs: FloatArray, targets: npt.NDArray[Any]) -> Totals:
        """The loss, and delta_j = Q p_j - q_j, from one e^.

        dL/dz_j = Q e^z_j / sum_i e^z_i - q_j = Q p_j - q_j: the Jacobian of softmax cancels against the derivative of
        the logarithm, which is why the seed document's table says "used with cross-entropy loss". Plainly Q = 1.

        The row's maximum is read where argmax found it (needed anyway to count right labels) and row sums are a
        product with ones: NumPy's reductions along a short axis take several times as long.
        """
        samples, shape = len(outputs), outputs.shape
        if self.positions is not None:
            outputs, targets = outputs.reshape(-1, self.units), targets.reshape(-1)
        n = len(outputs)
        starts = self.row_starts[:n]
        label_at = starts + targets
        predicted = outputs.argmax(axis=1)
        correct = float(np.count_nonzero(predicted == targets))

        delta: FloatArray = outputs if self.buffer is None else self.buffer[:n]
        np.subtract(outputs, outputs.take(starts + predicted)[:, np.newaxis], out=delta)
        flat = delta.reshape(-1)
        right_logits = flat.take(label_at)
        if self.plain:
            drawn = float(np.add.reduce(right_logits, dtype=np.float64))
        else:
            np.multiply(right_logits, self.label_table.take(targets), out=right_logits)
            drawn = float(np.add.reduce(right_logits, dtype=np.float64))
            drawn += float(np.add.reduce(np.dot(delta, self.spread_row), dtype=np.float64))
        np.exp(delta, out=delta)
        sums = np.dot(delta, self.ones, out=self.sums[:n])
        logarithms = np.log(sums)
        if self.plain:
            np.divide(delta, sums[:, np.newaxis], out=delta)
            flat[label_at] -= 1
        else:
            totals = self.total_table.take(targets)
            np.multiply(logarithms, totals, out=logarithms)
            np.multiply(delta, np.divide(totals, sums, out=totals)[:, np.newaxis], out=delta)
            np.subtract(delta, self.spread_row, out=delta)
            flat[label_at] -= self.label_table.take(targets)
        loss = float(np.add.reduce(logarithms, dtype=np.float64)) - drawn

        if self.positions is not None:
            np.multiply(delta, 1 / self.positions, out=delta)
            loss, correct = loss / self.positions, correct / self.positions
        self.delta: FloatArray = delta.reshape(shape)
        return Totals(loss, correct, samples)

    def backward(self) -> FloatArray:
        """Q p - q, over the positions where there are any; the derivation is at forward."""
        return self.delta

    def predict(self, outputs: FloatArray) -> None:
        """Probabilities: softmax of the logits."""
        rows = outputs.reshape(-1, self.units)
        functions.softmax(rows, out=rows)

    def check_targets(self, targets: npt.NDArray[Any], place: str, first: int = 0) -> None:
        """Whole numbers from 0 to units - 1, one a sample or as many as positions."""
        wanted = () if self.positions is None else (self.positions,)
        if targets.shape[1:] != wanted or not np.issubdtype(targets.dtype, np.integer):
            needed = "one label a sample" if self.positions is None else f"{self.positions} labels a sample"
            raise DataFault(
                f"{place}: targets are {targets.dtype} of shape {targets.shape[1:]} a sample, and the loss needs "
                f"{needed}: give class numbers 0, 1, 2, ... (are features and targets exchanged?)"
            )
        if np.iinfo(targets.dtype).min == 0 and np.iinfo(targets.dtype).max < self.units:
            return  # no value of the type is outside, and a text larger than memory need not be read
        outside = (targets < 0) | (targets >= self.units)
        if outside.any():
            row, *position = (int(index) for index in np.unravel_index(int(np.argmax(outside)), targets.shape))
            where = f"sample {first + row}" + "".join(f", position {number}" for number in position)
            raise DataFault(
                f"{place}: label {targets[(row, *position)]} of {where} is not among 0 to {self.units - 1},"
                f" the {self.units} outputs of the model: give the last dense layer more units or correct the label"
            )
