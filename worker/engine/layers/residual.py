"""The residual layer: y = x + F(x), where F is layers in a row that keep the sample's shape."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from protos import job_pb2
from worker.engine import chain  # the module: it needs the table of layers, which needs this file
from worker.engine.layers.layer import Finished, Moment, Reduce, Sums, Takes, Traits
from worker.engine.params import FloatArray, Parameter, Shape
from worker.errors import ModelFault


class Residual:
    """y = x + F(x) (He et al. 2016). Its parameters are those inside, under names such as `0.dense.weight`."""

    traits: ClassVar[Traits] = Traits(Takes.ANYTHING)
    reads_output: ClassVar[bool] = False
    works_in_place: ClassVar[bool] = False

    def __init__(self, options: job_pb2.ResidualLayer, input_shape: Shape) -> None:
        """ModelFault unless F keeps the shape, so that the sum exists."""
        self.inside = chain.Chain(options.layers, input_shape, "layers", nested=True)
        if self.inside.output_shape != input_shape:
            raise ModelFault(
                f"got samples of shape {input_shape}, and its layers make {self.inside.output_shape} of them; "
                "needs layers that keep the shape"
            )
        self.output_shape: Shape = input_shape
        self.parameters: tuple[Parameter, ...] = self.inside.parameters
        self.state: tuple[Parameter, ...] = self.inside.state
        self.sum_count = self.inside.sum_count
        self.synchronized = self.inside.synchronized

    def attach(self, values: Sequence[FloatArray], gradients: Sequence[FloatArray]) -> None:
        """Take views, in the order of `parameters`."""
        self.inside.attach(values, gradients)

    def check_batch(self, at_once: int, batch: int) -> None:
        """Hand on to the layers inside."""
        self.inside.check_batch(at_once, batch)

    def attach_state(self, values: Sequence[FloatArray], sums: Sums, reduce: Reduce) -> None:
        """Take views, in the order of `state`."""
        self.inside.attach_state(values, sums, reduce)

    def update_state(self) -> None:
        """Hand on to the layers inside."""
        self.inside.update_state()

    def reserve(self, batch_size: int, dtype: npt.DTypeLike, in_place: bool) -> None:
        """The buffers inside, the sum, and a dL/dy that the layers inside may write over.

        The sum is not written over F(x), which may be a view of x, nor over x, which the layers inside keep.
        """
        self.inside.reserve(batch_size, dtype)
        self.y = np.empty((batch_size, *self.output_shape), dtype)
        self.delta = np.empty_like(self.y)

    def begin(self, moment: Moment | None) -> None:
        """Hand on to the layers inside."""
        self.inside.begin(moment)

    def forward(self, x: FloatArray) -> FloatArray:
        """x + F(x)."""
        return np.add(x, self.inside.forward(x), out=self.y[: len(x)])

    def backward_parameters(self, dy: FloatArray, finished: Finished | None = None) -> None:
        """dF/dy = 1: the layers inside get dy as it is, as far back as one is trained.

        `finished` counts from the first parameter inside.
        """
        delta = self.delta[: len(dy)]
        np.copyto(delta, dy)
        self.delta_inside = self.inside.backward_parameters(delta, finished)

    def backward_input(self, dy: FloatArray) -> FloatArray:
        """dL/dx = dy + (dF/dx)^T dy: what passes F by, and what goes through it."""
        if not self.parameters:
            self.backward_parameters(dy)
        return np.add(dy, self.inside.backward_input(self.delta_inside), out=dy)
