"""What a layer is to the model.

A new layer is one message in protos/job.proto with a line in `Layer` there, and one class that keeps to the protocols
below and is named as the message is. Every layer is a `Layer`. One that acts otherwise in training than in evaluation
is a `VaryingLayer` too, and one that keeps numbers which training changes without a gradient is a `StatefulLayer`: the
model finds the methods and calls them, checkpoints, model files and the exchange between ranks follow by themselves.
What else the model should know of it stands in its `traits`; most layers have none to state.

Rules: a layer is made from its options in the job file and the shape of one incoming sample, and raises ModelFault
where they do not fit (the model adds the place). It makes its buffers in `reserve` and allocates nothing big
afterwards. `forward` may keep its input until `backward_*` has run; the caller leaves it alone until then. A
batch may be empty: of ranks that compute something together some may have no samples.
"""

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, ClassVar, Final, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from worker.engine.params import FloatArray, Parameter, Shape

Sums: TypeAlias = npt.NDArray[np.float64]
# Adds up a float64 vector over all ranks, in place, to the same bits on each. Every rank calls it as often and in the
# same order as the others.
Reduce: TypeAlias = Callable[[Sums], None]
# Is told while backward runs from which element on the gradient is finished: fewer each time, 0 at the end.
Finished: TypeAlias = Callable[[int], None]


class Moment(NamedTuple):
    """Where in a training run a batch stands: what may decide a layer's random choices, and nothing else may."""

    seed: int
    step: int  # from 1
    first: int  # place in the global batch of this rank's first sample
    path: tuple[int, ...] = ()  # index of the layer; within a residual, of that layer and of the one inside


# What a layer that takes nothing else says of another sample.
NEEDS_SEQUENCE: Final = (
    "needs (time, features): store samples with these two axes, or put an embedding before it where they are tokens"
)


class Takes(Enum):
    """What a sample is to a layer."""

    ANYTHING = 0  # each value, or each channel, by itself: the sample keeps its shape
    IMAGES = 1  # (height, width, channels)
    SEQUENCES = 2  # its last axis holds what belongs together, such as (time, features)
    TOKENS = 3  # whole numbers, which no gradient can be passed on to: it is the model's first layer
    ROWS = 4  # whatever its shape, it could as well be one row


class Traits(NamedTuple):
    """What those that arrange layers, or draw their weights, may know of one. Stated where it is not the default."""

    takes: Takes = Takes.ROWS
    # The parameter that adds one number to each channel of the output.
    channel_bias: str = ""
    # A number added to a whole channel is handed on as it is.
    keeps_channel_bias: bool = False
    # It cuts or damps negative values as ReLU does: weights in front of it are drawn as He et al. advise.
    is_rectifier: bool = False
    # Of a rectifier, for negative values.
    slope: float = 0.0
    # It may stand between weights and their rectifier: it moves, picks or averages values, or normalizes each channel
    # by itself, after which one size of weight is as good as another.
    passes_scale: bool = False


def traits_of(layer: object) -> Traits:
    """Those a layer, or its class, states, or the defaults."""
    traits: Traits = getattr(layer, "traits", Traits())
    return traits


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
        """dL/dx (n, *input_shape) given dy = dL/dy (n, *output_shape), which may be written over.

        Comes after `backward_parameters` of the same dy where the layer has parameters.
        """


@runtime_checkable
class VaryingLayer(Protocol):
    """A layer that does something else in training than in evaluation, or holds one that does."""

    def begin(self, moment: Moment | None) -> None:
        """What the next `forward` is: training at this moment, or evaluation (None)."""


@runtime_checkable
class StatefulLayer(Protocol):
    """A layer with state: numbers that training changes and no gradient does, such as running statistics.

    A step: `forward` adds this rank's part to the sums, once for each piece of its share; the exchange adds them up
    over all ranks; `update_state` makes of them the new state, the same on every rank. State is part of checkpoints and
    of the model file under the names given here.
    """

    state: tuple[Parameter, ...]  # arrays by name, shape and `initial` value
    sum_count: int  # float64 sums that `forward` leaves in training
    # It calls `reduce` in a step: ranks without samples then run it on an empty batch. Where the job file decides, the
    # field is called `synchronized` too, and the job's rules refuse micro_batch beside it.
    synchronized: bool

    def check_batch(self, at_once: int, batch: int) -> None:
        """ModelFault where so few samples, in a rank at once and in the whole batch, cannot train the layer."""

    def attach_state(self, values: Sequence[FloatArray], sums: Sums, reduce: Reduce) -> None:
        """Take views, in the order of `state`, and of the sums (sum_count,), which are 0."""

    def update_state(self) -> None:
        """Take the sums over all ranks and all samples of a step into the state, and set them to 0."""
