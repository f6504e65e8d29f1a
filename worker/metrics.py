"""What an evaluation counts beside loss and accuracy, under the names of the oneof in `Metric` of protos/job.proto.

Rules: a metric is a function of sums over samples. Ranks add up their own sums, the sums are added over ranks, and only
then does a metric become a number: exact whatever the number of ranks, never a mean of means. Metrics read the model's
outputs before the loss turns them into probabilities, which changes no order among them. Definitions are those of
scikit-learn, whose corners are kept: what would be divided by 0 is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

from protos import job_pb2
from worker.engine.model import Model
from worker.errors import ModelFault

Values: TypeAlias = dict[str, Any]  # name -> a number, a number for each class, or a matrix; all of them JSON


BYTES: Final = 256
BLOCK_ROWS: Final = 4096


class Batch(NamedTuple):
    """What a metric sees of some samples; the positions of sequences are rows like any other."""

    scores: np.ndarray  # (rows, classes) or, for values, (rows, k)
    targets: np.ndarray  # labels (rows,), values (rows, k), or whether each output is a yes (rows, k)
    predicted: np.ndarray  # labels (rows,), or yes of each output (rows, k); empty for values


class Metric(NamedTuple):
    """Sums, and what they come to."""

    width: int  # how many sums
    sums: Callable[[Batch], np.ndarray]  # (width,) float64, over the rows of a batch
    values: Callable[[np.ndarray], Values]  # from the sums over everything


def _top_k_accuracy(options: job_pb2.TopKAccuracyMetric, classes: int, center: np.ndarray) -> Metric:
    """Share of rows whose label is among the k highest outputs; of equal outputs the lower class comes first."""
    if options.k > classes:
        raise ModelFault(f".k: {options.k} is more than the {classes} classes of the model")

    def sums(batch: Batch) -> np.ndarray:
        rows = np.arange(len(batch.targets))
        own = batch.scores[rows, batch.targets][:, np.newaxis]
        earlier = np.arange(classes) < batch.targets[:, np.newaxis]
        ahead = ((batch.scores > own) | ((batch.scores == own) & earlier)).sum(axis=1)
        return np.array([np.count_nonzero(ahead < options.k), len(rows)], np.float64)

    return Metric(2, sums, lambda total: {f"top_{options.k}_accuracy": _ratio(total[0], total[1])})


def _class_counts(classes: int) -> Callable[[Batch], np.ndarray]:
    """For each class: rows given that label rightly, rows given it, rows that have it."""

    def sums(batch: Batch) -> np.ndarray:
        right = batch.targets[batch.targets == batch.predicted]
        counted = [np.bincount(labels, minlength=classes) for labels in (right, batch.predicted, batch.targets)]
        return np.concatenate(counted).astype(np.float64)

    return sums


def _by_class(name: str, classes: int) -> Metric:
    """A number for each class, and its mean over the classes that occur as a label or as a prediction."""

    def values(total: np.ndarray) -> Values:
        right, predicted, actual = total.reshape(3, classes)
        each = OF_COUNTS[name](right, predicted, actual)
        occurring = predicted + actual > 0
        mean = float(each[occurring].mean()) if occurring.any() else 0.0
        return {name: mean, f"{name}_per_class": each.tolist()}

    return Metric(3 * classes, _class_counts(classes), values)


def _by_output(name: str, outputs: int) -> Metric:
    """A number for each yes-or-no output, that of its yes, and its mean over all outputs."""

    def sums(batch: Batch) -> np.ndarray:
        right = batch.targets & batch.predicted
        return np.concatenate([np.count_nonzero(yes, axis=0) for yes in (right, batch.predicted, batch.targets)])

    def values(total: np.ndarray) -> Values:
        each = OF_COUNTS[name](*total.reshape(3, outputs))
        return {name: float(each.mean()), f"{name}_per_class": each.tolist()}

    return Metric(3 * outputs, sums, values)


# Precision: of the rows given a class, the share that has it. Recall: of the rows that have it, the share given it. F1:
# the harmonic mean of the two, p and r: 2pr / (p + r) = 2 right / (predicted + actual).
OF_COUNTS: Final[dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]]] = {
    "precision": lambda right, predicted, actual: _ratios(right, predicted),
    "recall": lambda right, predicted, actual: _ratios(right, actual),
    "f1": lambda right, predicted, actual: _ratios(2 * right, predicted + actual),
}


def _precision(options: job_pb2.PrecisionMetric, classes: int, center: np.ndarray) -> Metric:
    return _by_class("precision", classes)


def _recall(options: job_pb2.RecallMetric, classes: int, center: np.ndarray) -> Metric:
    return _by_class("recall", classes)


def _f1(options: job_pb2.F1Metric, classes: int, center: np.ndarray) -> Metric:
    return _by_class("f1", classes)


def _confusion_matrix(options: job_pb2.ConfusionMatrixMetric, classes: int, center: np.ndarray) -> Metric:
    """How many rows of each class (down) were given each class (across)."""

    def sums(batch: Batch) -> np.ndarray:
        cells = batch.targets * classes + batch.predicted
        return np.bincount(cells, minlength=classes * classes).astype(np.float64)

    def values(total: np.ndarray) -> Values:
        return {"confusion_matrix": total.reshape(classes, classes).astype(np.int64).tolist()}

    return Metric(classes * classes, sums, values)


def _root_mean_squared_error(options: job_pb2.RootMeanSquaredErrorMetric, k: int, center: np.ndarray) -> Metric:
    """sqrt(mean (y - yhat)^2) of each output, and the mean of these over the outputs."""

    def sums(batch: Batch) -> np.ndarray:
        errors = batch.scores.astype(np.float64) - batch.targets
        return np.append((errors * errors).sum(axis=0), len(errors))

    def values(total: np.ndarray) -> Values:
        return {"root_mean_squared_error": float(np.sqrt(_ratios(total[:k], total[k:])).mean())}

    return Metric(k + 1, sums, values)


def _r2(options: job_pb2.R2Metric, k: int, center: np.ndarray) -> Metric:
    """1 - sum (y - yhat)^2 / sum (y - mean y)^2 of each output, and the mean of these over the outputs.

    With d = y - center, sum (y - mean y)^2 = sum d^2 - (sum d)^2 / n for any center. `center` is near the mean of y,
    so no digits cancel. An output whose target never varies has 1 when it is met and 0 when it is not.
    """

    def sums(batch: Batch) -> np.ndarray:
        errors = batch.scores.astype(np.float64) - batch.targets
        d = batch.targets - center
        return np.concatenate([(errors * errors).sum(axis=0), d.sum(axis=0), (d * d).sum(axis=0), [len(d)]])

    def values(total: np.ndarray) -> Values:
        unexplained, offset, squares = total[:-1].reshape(3, k)
        variation = np.maximum(squares - _ratios(offset * offset, total[-1:]), 0)
        each = np.where(variation > 0, 1 - _ratios(unexplained, variation), np.where(unexplained > 0, 0.0, 1.0))
        return {"r2": float(each.mean())}

    return Metric(3 * k + 1, sums, values)


def _bits_per_byte(options: job_pb2.BitsPerByteMetric, classes: int, center: np.ndarray) -> Metric:
    """-log2 p of the byte that came, on average: the cross-entropy L in units of log 2, whatever the loss adds to it.

    L = log sum_i e^(z_i - c) - (z_y - c) with c = max_i z_i, as at SoftmaxCrossEntropy.
    """
    if classes != BYTES:
        raise ModelFault(f": needs the {BYTES} classes of bytes, and the model has {classes}: end with {BYTES} units")

    def sums(batch: Batch) -> np.ndarray:
        nats = 0.0
        for first in range(0, len(batch.targets), BLOCK_ROWS):  # an evaluation has too many rows to copy at once
            scores, targets = batch.scores[first : first + BLOCK_ROWS], batch.targets[first : first + BLOCK_ROWS]
            shifted = scores - scores.max(axis=1, keepdims=True)
            right = np.take_along_axis(shifted, targets[:, np.newaxis], axis=1)
            logarithms = np.log(np.exp(shifted).sum(axis=1))
            nats += float(np.sum(logarithms, dtype=np.float64) - np.sum(right, dtype=np.float64))
        return np.array([nats, len(batch.targets)])

    return Metric(2, sums, lambda total: {"bits_per_byte": _ratio(total[0], total[1]) / math.log(2)})


METRICS: Final[dict[str, Callable[[Any, int, np.ndarray], Metric]]] = {
    "top_k_accuracy": _top_k_accuracy,
    "precision": _precision,
    "recall": _recall,
    "f1": _f1,
    "confusion_matrix": _confusion_matrix,
    "root_mean_squared_error": _root_mean_squared_error,
    "r2": _r2,
    "bits_per_byte": _bits_per_byte,
}


class MetricSums:
    """The metrics a job asks for over one data set: add batches, add up `sums` over ranks, read `values`.

    Args:
        targets: of the whole data set, the same on every rank.

    Raises:
        ModelFault: a metric does not fit the model; names it.
    """

    def __init__(self, metrics: Sequence[job_pb2.Metric], model: Model, targets: np.ndarray) -> None:
        units = model.output_shape[-1]
        yes_or_no = model.loss_kind == "binary_cross_entropy"
        self._logits_of_two = yes_or_no and units == 1
        self._logits_of_many = yes_or_no and units > 1
        self._labels = yes_or_no or model.loss_kind == "softmax_cross_entropy"
        width = 2 if self._logits_of_two else units
        center = np.zeros(units) if self._labels else targets.mean(axis=0, dtype=np.float64)
        self._metrics = []
        for index, metric in enumerate(metrics):
            kind = str(metric.WhichOneof("kind"))
            if self._logits_of_many:
                if kind not in OF_COUNTS:
                    raise ModelFault(
                        f"metrics[{index}].{kind}: needs one label a sample, and binary_cross_entropy over {units} "
                        f"outputs gives {units} of them; it takes {', '.join(OF_COUNTS)}"
                    )
                self._metrics.append(_by_output(kind, units))
                continue
            try:
                self._metrics.append(METRICS[kind](getattr(metric, kind), width, center))
            except ModelFault as fault:
                # The message begins with the setting at fault, or with a colon.
                raise ModelFault(f"metrics[{index}].{kind}{fault}") from None
        self.sums = np.zeros(sum(metric.width for metric in self._metrics))

    def add(self, outputs: np.ndarray, targets: np.ndarray) -> None:
        """Count samples: outputs (n, *output_shape) as the last layer gave them."""
        batch = self._batch(outputs, targets)
        parts = [metric.sums(batch) for metric in self._metrics]
        if parts:
            self.sums += np.concatenate(parts)

    def values(self) -> Values:
        """What the sums come to; what is not a finite number is left out, as JSON has no nan."""
        found: Values = {}
        start = 0
        for metric in self._metrics:
            found |= metric.values(self.sums[start : start + metric.width])
            start += metric.width
        return {name: value for name, value in found.items() if not isinstance(value, float) or math.isfinite(value)}

    def _batch(self, outputs: np.ndarray, targets: np.ndarray) -> Batch:
        if not self._labels:
            return Batch(outputs, targets, np.empty(0, np.int64))
        if self._logits_of_many:
            return Batch(outputs, targets >= 0.5, outputs > 0)
        if self._logits_of_two:
            yes = outputs.reshape(-1)
            scores = np.stack([-yes, yes], axis=1)
            return Batch(scores, (targets.reshape(-1) >= 0.5).astype(np.int64), (yes > 0).astype(np.int64))
        scores = outputs.reshape(-1, outputs.shape[-1])
        return Batch(scores, targets.reshape(-1), scores.argmax(axis=1))


def _ratio(above: float, below: float) -> float:
    return float(above / below) if below else 0.0


def _ratios(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Element by element, 0 where the divisor is."""
    quotients = np.zeros(np.broadcast(above, below).shape)
    np.divide(above, below, out=quotients, where=below != 0)
    return quotients
