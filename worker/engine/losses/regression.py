"""Losses of values: halved squares, absolute differences, and Huber's mixture of the two.

Rules: a sample's loss is the sum over its outputs, as in the seed document, and not their mean.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from protos import job_pb2
from worker.engine.losses.loss import Totals, check_values, require_row
from worker.engine.params import FloatArray, Shape
from worker.errors import ModelFault


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

    def check_targets(self, targets: npt.NDArray[Any], place: str, first: int = 0) -> None:
        """Finite values, as many as outputs."""
        check_values(targets, self.units, place, first)


class Huber:
    """L_j = d^2 / 2 where |d| <= delta, else delta (|d| - delta / 2), with d = yhat_j - y_j (P. Huber, 1964).

    Both pieces are c (|d| - c / 2) with c = min(|d|, delta): with |d| <= delta that is |d| (|d| - |d| / 2) = d^2 / 2.
    A large delta makes it the mean_squared_error of this project, 1/2 included.
    """

    def __init__(self, options: job_pb2.HuberLoss, output_shape: Shape) -> None:
        """ModelFault unless outputs are one row, or when delta is absent: read as 0 it would make every loss 0."""
        self.units = require_row(output_shape)
        if not options.HasField("delta"):
            raise ModelFault("delta: is absent, a resolved job has it")
        self.bend = options.delta

    def reserve(self, batch_size: int, dtype: npt.DTypeLike, in_place: bool) -> None:
        """Room for delta^[L] unless it may lie in the outputs, and for two intermediate arrays."""
        self.buffer = None if in_place else np.empty((batch_size, self.units), dtype)
        self.scratch = np.empty((2, batch_size, self.units), dtype)

    def forward(self, outputs: FloatArray, targets: npt.NDArray[Any]) -> Totals:
        """The loss, and dL_j/dyhat_j: d where |d| <= delta, else delta sign(d): d held between -delta and delta."""
        n = len(outputs)
        magnitude, bent = self.scratch[:, :n]
        self.delta: FloatArray = outputs if self.buffer is None else self.buffer[:n]
        np.subtract(outputs, targets, out=self.delta)
        np.abs(self.delta, out=magnitude)
        np.minimum(magnitude, self.bend, out=bent)
        # c (|d| - c / 2), as half of c (2 |d| - c): no third array is needed.
        np.multiply(magnitude, 2, out=magnitude)
        np.subtract(magnitude, bent, out=magnitude)
        np.multiply(magnitude, bent, out=magnitude)
        np.clip(self.delta, -self.bend, self.bend, out=self.delta)
        return Totals(0.5 * float(np.add.reduce(magnitude, axis=None, dtype=np.float64)), np.nan, n)

    def backward(self) -> FloatArray:
        """d held between -delta and delta; the derivation is at forward."""
        return self.delta

    def predict(self, outputs: FloatArray) -> None:
        """The outputs are the prediction."""

    def check_targets(self, targets: npt.NDArray[Any], place: str, first: int = 0) -> None:
        """Finite values, as many as outputs."""
        check_values(targets, self.units, place, first)


class MeanAbsoluteError:
    """L = 1/m sum |y - yhat|: sum_j |y_j - yhat_j| for each sample."""

    def __init__(self, options: job_pb2.MeanAbsoluteErrorLoss, output_shape: Shape) -> None:
        """ModelFault unless outputs are one row."""
        self.units = require_row(output_shape)

    def reserve(self, batch_size: int, dtype: npt.DTypeLike, in_place: bool) -> None:
        """Room for delta unless it may lie in the outputs, and for magnitudes."""
        self.buffer = None if in_place else np.empty((batch_size, self.units), dtype)
        self.magnitudes = np.empty((batch_size, self.units), dtype)

    def forward(self, outputs: FloatArray, targets: npt.NDArray[Any]) -> Totals:
        """The sum of |yhat - y|, and delta = sign(yhat - y)."""
        n = len(outputs)
        self.delta: FloatArray = outputs if self.buffer is None else self.buffer[:n]
        np.subtract(outputs, targets, out=self.delta)
        magnitudes = np.abs(self.delta, out=self.magnitudes[:n])
        np.sign(self.delta, out=self.delta)
        return Totals(float(np.add.reduce(magnitudes, axis=None, dtype=np.float64)), np.nan, n)

    def backward(self) -> FloatArray:
        """dL/dyhat_j = sign(yhat_j - y_j), and 0 at the kink, where any slope from -1 to 1 is a subgradient."""
        return self.delta

    def predict(self, outputs: FloatArray) -> None:
        """The outputs are the prediction."""

    def check_targets(self, targets: npt.NDArray[Any], place: str, first: int = 0) -> None:
        """Finite values, as many as outputs."""
        check_values(targets, self.units, place, first)
