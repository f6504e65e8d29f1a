"""Learned positions: a trained row added to each position of a sample."""

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from protos import job_pb2
from worker.engine.layers.layer import NEEDS_SEQUENCE, Takes, Traits
from worker.engine.params import FloatArray, Parameter, Shape
from worker.errors import ModelFault


class Positions:
    """y_t = x_t + p_t: what tells attention, which sees a set, where in the sequence a row stands."""

    traits: ClassVar[Traits] = Traits(Takes.SEQUENCES)
    reads_output: ClassVar[bool] = False
    works_in_place: ClassVar[bool] = True

    def __init__(self, options: job_pb2.PositionsLayer, input_shape: Shape) -> None:
        """ModelFault unless a sample is (time, features)."""
        if len(input_shape) != 2 or math.prod(input_shape) < 1:
            raise ModelFault(f"got samples of shape {input_shape}, {NEEDS_SEQUENCE}")
        self.output_shape: Shape = input_shape
        # As for an embedding: a position is one live input.
        self.parameters: tuple[Parameter, ...] = (Parameter("weight", input_shape, fan_in=1, fan_out=input_shape[-1]),)

    def attach(self, values: Sequence[FloatArray], gradients: Sequence[FloatArray]) -> None:
        """Take views: weight (time, features) and its gradient."""
        (self.weight,) = values
        if gradients:
            (self.d_weight,) = gradients

    def reserve(self, batch_size: int, dtype: npt.DTypeLike, in_place: bool) -> None:
        """The output unless it goes over the input."""
        self.output = None if in_place else np.empty((batch_size, *self.output_shape), dtype)
        self.ones = np.ones(batch_size, dtype)

    def forward(self, x: FloatArray) -> FloatArray:
        """x (n, time, features) with the rows added."""
        return np.add(x, self.weight, out=x if self.output is None else self.output[: len(x)])

    def backward_parameters(self, dy: FloatArray) -> None:
        """dy_t/dp_t = 1, so dL/dp_t = sum over samples of dL/dy_t; a product with ones, as in the dense layer."""
        np.dot(self.ones[: len(dy)], dy.reshape(len(dy), self.d_weight.size), out=self.d_weight.reshape(-1))

    def backward_input(self, dy: FloatArray) -> FloatArray:
        """dy/dx = 1."""
        return dy
