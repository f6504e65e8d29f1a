"""The losses, under the names the job file gives them: those of the oneof in `Loss` of protos/job.proto.

A new loss is a message in job.proto, a class that keeps to loss.py, and a line in each table here.
"""

from typing import Final

from worker.engine.losses.binary_cross_entropy import BinaryCrossEntropy
from worker.engine.losses.loss import Loss, Totals
from worker.engine.losses.regression import Huber, MeanAbsoluteError, MeanSquaredError
from worker.engine.losses.softmax_cross_entropy import SoftmaxCrossEntropy

__all__ = ["LOSSES", "TARGET_KIND", "Loss", "Totals"]

# What a data source has to deliver as targets: "labels" are int64 (n,) or (n, T), "values" are float32 (n, k).
TARGET_KIND: Final[dict[str, str]] = {
    "mean_squared_error": "values",
    "softmax_cross_entropy": "labels",
    "binary_cross_entropy": "values",
    "huber": "values",
    "mean_absolute_error": "values",
}

LOSSES: Final[dict[str, type[Loss]]] = {
    "mean_squared_error": MeanSquaredError,
    "softmax_cross_entropy": SoftmaxCrossEntropy,
    "binary_cross_entropy": BinaryCrossEntropy,
    "huber": Huber,
    "mean_absolute_error": MeanAbsoluteError,
}
