"""The softmax layer, with its own Jacobian. With cross-entropy, use the loss that fuses the two instead."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from protos import job_pb2
from worker.engine import functions
from worker.engine.params import FloatArray, Parameter, Shape
from worker.errors import ModelFault


class Softmax:
    """f(x)_i = e^x_i / sum_j e^x_j over the values of one sample."""

    reads_output: ClassVar[bool] = True
    works_in_place: ClassVar[bool] = True
    parameters: tuple[Parameter, ...] = ()

    def __init__(self, options: job_pb2.SoftmaxLayer, input_shape: Shape) -> None:
        """ModelFault unless a sample is one row of values."""
        if len(input_shape) != 1:
            raise ModelFault(
                f"got samples of shape {input_shape}, needs one row of values: put a dense layer before it"
            )
        self.output_shape: Shape = input_shape

    def attach(self, values: Sequence[FloatArray], gradients: Sequence[FloatArray]) -> None:
        """Nothing to attach."""

    def reserve(self, batch_size: int, dtype: npt.DTypeLike, in_place: bool) -> None:
        """A buffer for the output unless the input's will do, and one for the weighted gradient."""
        shape = (batch_size, *self.output_shape)
        self.output = None if in_place else np.empty(shape, dtype)
        self.scratch = np.empty(shape, dtype)

    def forward(self, x: FloatArray) -> FloatArray:
        """Probabilities (n, k), each row summing to 1."""
        self.y: FloatArray = x if self.output is None else self.output[: len(x)]
        functions.softmax(x, out=self.y)
        return self.y

    def backward_parameters(self, dy: FloatArray) -> None:
        """Nothing is trained."""

    def backward_input(self, dy: FloatArray) -> FloatArray:
        """dx_i = y_i (dy_i - sum_j dy_j y_j).

        With S = sum_j e^x_j: dy_j/dx_i = ([i = j] e^x_j S - e^x_j e^x_i) / S^2 = y_j ([i = j] - y_i), the Jacobian
        diag(y) - y y^T. It is symmetric; applied to dy it is the line above, without making the (k, k) matrix.
        """
        weighted = self.scratch[: len(dy)]
        np.multiply(dy, self.y, out=weighted)
        np.subtract(dy, weighted.sum(axis=1, keepdims=True), out=dy)
        return np.multiply(dy, self.y, out=dy)
