"""The linear layer: z = W a + b at each position of a sample, over its last axis."""

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from protos import job_pb2
from worker.engine.layers.layer import Takes, Traits
from worker.engine.params import FloatArray, Parameter, Shape
from worker.errors import ModelFault


class Linear:
    """Y = X W + b with the positions of all samples as rows of X; `dense` takes a sample as one row instead."""

    traits: ClassVar[Traits] = Traits(Takes.SEQUENCES, channel_bias="bias")
    reads_output: ClassVar[bool] = False
    works_in_place: ClassVar[bool] = False

    def __init__(self, options: job_pb2.LinearLayer, input_shape: Shape) -> None:
        """ModelFault when there is nothing to multiply: no units, or samples without values."""
        self.units = options.units
        if self.units < 1:
            raise ModelFault(f"units: {self.units} is not at least 1")
        if math.prod(input_shape) < 1 or not input_shape:
            raise ModelFault(f"got samples of shape {input_shape}, which hold no values; needs at least one")
        self.inputs = input_shape[-1]
        self.input_shape = input_shape
        self.output_shape: Shape = (*input_shape[:-1], self.units)
        self.parameters: tuple[Parameter, ...] = (
            Parameter("weight", (self.inputs, self.units), fan_in=self.inputs, fan_out=self.units),
            Parameter("bias", (self.units,), fan_in=0, fan_out=0),
        )

    def attach(self, values: Sequence[FloatArray], gradients: Sequence[FloatArray]) -> None:
        """Take views: weight (in, out), bias (out,), and the gradients alike."""
        self.weight, self.bias = values
        if gradients:
            self.d_weight, self.d_bias = gradients

    def reserve(self, batch_size: int, dtype: npt.DTypeLike, in_place: bool) -> None:
        """The output and the gradient of the input, the latter only touched when asked for."""
        self.y = np.empty((batch_size, *self.output_shape), dtype)
        self.dx = np.empty((batch_size, *self.input_shape), dtype)
        self.ones = np.ones(batch_size * math.prod(self.input_shape[:-1]), dtype)

    def forward(self, x: FloatArray) -> FloatArray:
        """Y = X W + b: x (n, ..., in) -> (n, ..., out)."""
        self.x = x.reshape(-1, self.inputs)
        y = self.y[: len(x)]
        rows = y.reshape(-1, self.units)
        np.matmul(self.x, self.weight, out=rows)
        np.add(rows, self.bias, out=rows)
        return y

    def backward_parameters(self, dy: FloatArray) -> None:
        """As for the dense layer, with a row for each position: dW = X^T dY, db = the column sums of dY."""
        rows = dy.reshape(-1, self.units)
        np.matmul(self.x.T, rows, out=self.d_weight)
        np.dot(self.ones[: len(rows)], rows, out=self.d_bias)

    def backward_input(self, dy: FloatArray) -> FloatArray:
        """dX = dY W^T."""
        dx = self.dx[: len(dy)]
        np.matmul(dy.reshape(-1, self.units), self.weight.T, out=dx.reshape(-1, self.inputs))
        return dx
