"""The dense layer: z = W a + b over the whole sample taken as one row."""

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from protos import job_pb2
from worker.engine.layers.layer import Traits
from worker.engine.params import FloatArray, Parameter, Shape
from worker.errors import ModelFault


class Dense:
    """z^[l] = W^[l] a^[l-1] + b^[l] (seed document, forward pass).

    The document writes a sample as a column; here a batch holds a sample in each row, so with the weight stored as
    (in, out), the transpose of the document's W, the same equation reads Y = X W + b. Without a bias b is 0.
    """

    traits: ClassVar[Traits] = Traits(channel_bias="bias")
    reads_output: ClassVar[bool] = False
    works_in_place: ClassVar[bool] = False

    def __init__(self, options: job_pb2.DenseLayer, input_shape: Shape) -> None:
        """ModelFault when there is nothing to multiply (no units, samples without values) or the job is unresolved."""
        self.inputs = math.prod(input_shape)
        self.units = options.units
        if self.units < 1:
            raise ModelFault(f"units: {self.units} is not at least 1")
        if self.inputs < 1:
            raise ModelFault(f"got samples of shape {input_shape}, which hold no values; needs at least one")
        if not options.HasField("bias"):
            raise ModelFault("bias: is absent, a resolved job has it")
        self.input_shape = input_shape
        self.output_shape: Shape = (self.units,)
        weight = Parameter("weight", (self.inputs, self.units), fan_in=self.inputs, fan_out=self.units)
        bias = Parameter("bias", (self.units,), fan_in=0, fan_out=0)
        self.has_bias = options.bias
        self.parameters: tuple[Parameter, ...] = (weight, bias) if self.has_bias else (weight,)

    def attach(self, values: Sequence[FloatArray], gradients: Sequence[FloatArray]) -> None:
        """Take views: weight (in, out), bias (out,) if there is one, and the gradients alike."""
        self.weight, *self.bias = values
        if gradients:
            self.d_weight, *self.d_bias = gradients

    def reserve(self, batch_size: int, dtype: npt.DTypeLike, in_place: bool) -> None:
        """The output (n, out) and the gradient of the input (n, in), the latter only touched when asked for."""
        self.y = np.empty((batch_size, self.units), dtype)
        self.dx = np.empty((batch_size, self.inputs), dtype)
        self.ones = np.ones(batch_size, dtype)

    def forward(self, x: FloatArray) -> FloatArray:
        """Y = X W + b: x (n, *sample) -> (n, out)."""
        self.x = x.reshape(len(x), self.inputs)
        y = self.y[: len(x)]
        np.matmul(self.x, self.weight, out=y)
        for bias in self.bias:
            np.add(y, bias, out=y)
        return y

    def backward_parameters(self, dy: FloatArray) -> None:
        """dL/dW = sum over samples of delta (a^[l-1])^T, dL/db = sum of delta (seed document, step 4, before its 1/m).

        y_j = sum_i x_i W_ij + b_j, so dy_j/dW_ij = x_i and dy_j/db_j = 1; summed over the batch that is X^T dY and
        the column sums of dY. The sums are a product with ones, which BLAS does in half the time of a reduction.
        """
        np.matmul(self.x.T, dy, out=self.d_weight)
        for d_bias in self.d_bias:
            np.dot(self.ones[: len(dy)], dy, out=d_bias)

    def backward_input(self, dy: FloatArray) -> FloatArray:
        """The factor (W^[l+1])^T delta^[l+1] of the seed document's delta^[l].

        dy_j/dx_i = W_ij, so dL/dx_i = sum_j W_ij dL/dy_j: dX = dY W^T.
        """
        dx = self.dx[: len(dy)]
        np.matmul(dy, self.weight.T, out=dx)
        return dx.reshape(len(dy), *self.input_shape)
