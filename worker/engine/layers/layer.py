"""What a layer is to the model.

Rules: a layer is made from its options in the job file and the shape of one incoming sample, and raises ModelFault
where they do not fit (the model adds the place). It makes its buffers in `reserve` and allocates nothing big
afterwards. `forward` may keep its input until `backward_*` has run; the caller leaves it alone until then.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy.typing as npt

from worker.engine.params import FloatArray, Parameter, Shape


class Moment(NamedTuple):
    """Where in a training run a batch stands: what may decide a layer's random choices, and nothing else may."""

    seed: int
    step: int  # from 1
    first: int  # place in the global batch of this rank's first sample
    path: tuple[int, ...] = ()  # index of the layer; within a residual, of that layer and of the one inside


class Layer(Protocol):
    """One layer; shapes are those of one sample, arrays have the batch as first axis."""

    # `backward_input` reads what `forward` returned, so nothing may be written over it.
    reads_output: ClassVar[bool]
    # `forward` can write over its input.
    works_in_place: ClassVar[bool]

    output_shape: Shape
    parameters: tuple[Parameter, ...]

    def __init__(self, options: Any, input_shape: Shape) -> None: ...

    def attach(self, values: Sequence[FloatArray], gradients: Sequence[FloatArray]) -> None:
        """Take views of the flat vectors, in the order of `parameters`; `gradients` is empty when not training."""

    def reserve(self, batch_size: int, dtype: npt.DTypeLike, in_place: bool) -> None:
        """Make the buffers for up to `batch_size` samples. `in_place`: `forward` is to write over its input."""

    def forward(self, x: FloatArray) -> FloatArray:
        """The layer's output for x (n, *input_shape): (n, *output_shape), in a buffer of this layer or in x."""

    def backward_parameters(self, dy: FloatArray) -> None:
        """Write (not add) the gradients of the parameters, summed over the batch, given dy = dL/dy."""

    def backward_input(self, dy: FloatArray) -> FloatArray:
        """dL/dx (n, *input_shape) given dy = dL/dy (n, *output_shape), which may be written over."""


@runtime_checkable
class VaryingLayer(Protocol):
    """A layer that does something else in training than in evaluation, or holds one that does."""

    def begin(self, moment: Moment | None) -> None:
        """What the next `forward` is: training at this moment, or evaluation (None)."""
