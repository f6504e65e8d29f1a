"""The flatten layer: a sample of any shape as one row of values."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy.typing as npt

from worker.engine.layers.layer import Traits
from worker.engine.params import FloatArray, Parameter, Shape


class Flatten:
    """y is x under another shape, and so is dL/dx: no value is touched or copied."""

    traits: ClassVar[Traits] = Traits(keeps_channel_bias=True, passes_scale=True)
    # Its output is its input's memory, which the layer before may still read.
    reads_output: ClassVar[bool] = True
    works_in_place: ClassVar[bool] = False
    parameters: tuple[Parameter, ...] = ()

    def __init__(self, options: Any, input_shape: Shape) -> None:
        """Any shape will do."""
        self.input_shape = input_shape
        self.output_shape: Shape = (math.prod(input_shape),)

    def attach(self, values: Sequence[FloatArray], gradients: Sequence[FloatArray]) -> None:
        """Nothing to attach."""

    def reserve(self, batch_size: int, dtype: npt.DTypeLike, in_place: bool) -> None:
        """No buffers."""

    def forward(self, x: FloatArray) -> FloatArray:
        """x (n, *sample) -> (n, values), a view."""
        return x.reshape(len(x), *self.output_shape)

    def backward_parameters(self, dy: FloatArray) -> None:
        """Nothing is trained."""

    def backward_input(self, dy: FloatArray) -> FloatArray:
        """dy in the shape of x, a view."""
        return dy.reshape(len(dy), *self.input_shape)
