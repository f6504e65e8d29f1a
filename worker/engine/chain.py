"""Layers in a row: what a model is made of, and what a residual layer holds.

Rules: everything that can be wrong with the layers is found when the chain is made, before an array exists. Parameters
follow each other in layer order under names such as `0.dense.weight`.
"""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy.typing as npt

from protos import job_pb2
from worker.engine.layers.layer import (
    Finished,
    Layer,
    Moment,
    Reduce,
    StatefulLayer,
    Sums,
    Takes,
    VaryingLayer,
    traits_of,
)
from worker.engine.params import FloatArray, Parameter, Shape
from worker.engine.run_order import run_order
from worker.errors import ModelFault

if TYPE_CHECKING:
    from worker.engine.layers.batch_norm import BatchNorm
    from worker.engine.layers.residual import Residual


class NestedFault(ModelFault):
    """A fault of a layer inside another; its message begins with the place inside."""


class Placed(NamedTuple):
    """A layer and where it stands."""

    place: str  # "2.dense"
    kind: str
    layer: Layer


class Chain:
    """Layers one behind the other, each made for the shape the one before puts out."""

    def __init__(
        self, layers: Sequence[job_pb2.Layer], input_shape: Shape, place: str = "model", nested: bool = False
    ) -> None:
        """ModelFault naming the layer (`model[2].dense`), what it got and what it needs.

        Args:
            place: the list's name in the job file.
            nested: the layers stand inside another, whose place is put before theirs.
        """
        self._place, self._fault_type = place, NestedFault if nested else ModelFault
        order = run_order(layers)
        built = self._build(layers, order, input_shape, nested)
        self.layers = [built[index] for index in range(len(layers))]  # as the job file has them
        self.output_shape: Shape = built[order[-1]].layer.output_shape
        # What the layers put out for one sample: about what their buffers hold, as a number to choose a batch by.
        self.values_per_sample = sum(_values_per_sample(placed.layer) for placed in self.layers)
        self.parameters: tuple[Parameter, ...] = tuple(
            _within(placed, _follower(self.layers[index + 1 :]), parameter)
            for index, placed in enumerate(self.layers)
            for parameter in placed.layer.parameters
        )
        self.running = [built[index].layer for index in order]
        self._stateful = [(index, layer) for index, placed in enumerate(self.layers) if (layer := _stateful(placed))]
        self.state: tuple[Parameter, ...] = tuple(
            array._replace(name=f"{self.layers[index].place}.{array.name}")
            for index, layer in self._stateful
            for array in layer.state
        )
        self.sum_count = sum(layer.sum_count for _, layer in self._stateful)
        self.synchronized = any(layer.synchronized for _, layer in self._stateful)
        # Nothing before the first layer with parameters is asked for a parameter's gradient.
        trained = [index for index, layer in enumerate(self.running) if layer.parameters]
        self.first_trained = trained[0] if trained else len(self.running)
        stops = list(accumulate((_elements(placed.layer) for placed in self.layers), initial=0))
        self._starts = [stops[index] for index in order]  # of each running layer's parameters
        # Where the parameters end of all layers that run before one: what lies behind is finished once it has run back.
        ends = [stops[index + 1] if built[index].layer.parameters else 0 for index in order]
        self._finished_from = list(accumulate(ends[:-1], max, initial=0))
        self._holders: dict[int, Residual] = {
            place: layer  # type: ignore[misc]  # what holds a chain is a Residual
            for place, layer in enumerate(self.running)
            if isinstance(getattr(layer, "inside", None), Chain)
        }
        self._cancelled = _cancelled_biases([built[index] for index in order])
        # By the running layer that writes them.
        self._cancelled_gradients: dict[int, tuple[BatchNorm, FloatArray]] = {}
        # Asked once: isinstance of a protocol takes 5 us, which would be every layer's at every step.
        self._varying = [
            (index, placed.layer) for index, placed in enumerate(self.layers) if isinstance(placed.layer, VaryingLayer)
        ]

    def attach(self, values: Sequence[FloatArray], gradients: Sequence[FloatArray]) -> None:
        """Hand the views, in the order of `parameters`, to the layers."""
        start = 0
        for placed in self.layers:
            stop = start + len(placed.layer.parameters)
            placed.layer.attach(values[start:stop], gradients[start:stop])
            start = stop
        names = [parameter.name for parameter in self.parameters]
        self._cancelled_gradients = {
            place: (normalization, gradients[names.index(name)])
            for name, (place, normalization) in self._cancelled.items()
            if gradients and name in names  # a layer may have no bias
        }

    def check_batch(self, at_once: int, batch: int) -> None:
        """ModelFault naming the layer that so few samples, in a rank at once and in the whole batch, cannot train."""
        for index, layer in self._stateful:
            try:
                layer.check_batch(at_once, batch)
            except ModelFault as fault:
                raise self._fault(index, self.layers[index].kind, fault) from None

    def attach_state(self, values: Sequence[FloatArray], sums: Sums, reduce: Reduce) -> None:
        """Hand the views, in the order of `state`, and each its part of the sums to the layers."""
        first, first_sum = 0, 0
        for _, layer in self._stateful:
            last, last_sum = first + len(layer.state), first_sum + layer.sum_count
            layer.attach_state(values[first:last], sums[first_sum:last_sum], reduce)
            first, first_sum = last, last_sum

    def update_state(self) -> None:
        """The state after a step, of the sums over all ranks."""
        for _, layer in self._stateful:
            layer.update_state()

    def reserve(self, batch_size: int, dtype: npt.DTypeLike) -> bool:
        """Make the layers' buffers; whether what comes behind may write over the last output."""
        overwritable = False  # whether the next layer may write over its input; never over the caller's
        for layer in self.running:
            layer.reserve(batch_size, dtype, in_place=overwritable and layer.works_in_place)
            overwritable = not layer.reads_output
        return overwritable

    def begin(self, moment: Moment | None) -> None:
        """Tell the layers that act by it whether the next forward is training, and when, or evaluation (None)."""
        for index, layer in self._varying:
            layer.begin(moment and moment._replace(path=(*moment.path, index)))

    def forward(self, x: FloatArray) -> FloatArray:
        """The last layer's output."""
        for layer in self.running:
            x = layer.forward(x)
        return x

    def backward_parameters(self, dy: FloatArray, finished: Finished | None = None) -> FloatArray:
        """Write the parameters' gradients, layer by layer from the last; dL/d(output of the first trained layer).

        Each layer turns its output's delta into its parameters' gradient and into the delta of the layer before (seed
        document, steps 3 and 4). Parameters lie in layer order, so what is finished is always a suffix.

        Args:
            finished: called behind each layer with parameters; it counts from the chain's first parameter.
        """
        for index in range(len(self.running) - 1, self.first_trained - 1, -1):
            layer = self.running[index]
            if layer.parameters:
                if finished is not None and index in self._holders:
                    self._holders[index].backward_parameters(dy, self._finished_inside(index, finished))
                else:
                    layer.backward_parameters(dy)
                if index in self._cancelled_gradients:
                    normalization, gradient = self._cancelled_gradients[index]
                    if normalization.training:
                        gradient[...] = 0
                if finished is not None:
                    finished(self._finished_from[index])
            if index > self.first_trained:
                dy = layer.backward_input(dy)
        return dy

    def backward_input(self, dy: FloatArray) -> FloatArray:
        """dL/dx from what `backward_parameters` returned."""
        for index in range(min(self.first_trained, len(self.running) - 1), -1, -1):
            dy = self.running[index].backward_input(dy)
        return dy

    def _finished_inside(self, index: int, finished: Finished) -> Finished:
        """What the layers inside a running layer tell: counted from their first parameter."""
        start, floor = self._starts[index], self._finished_from[index]
        return lambda first: finished(max(start + first, floor))

    def _build(
        self, layers: Sequence[job_pb2.Layer], order: Sequence[int], input_shape: Shape, nested: bool
    ) -> dict[int, Placed]:
        """Every layer under its index in the job file, made in the order in which they run."""
        # Imported here: the table holds the residual layer, which holds a chain.
        from worker.engine.layers import LAYERS, tiles

        if not layers:
            raise self._fault_type(f"{self._place}: has no layers")
        placed: dict[int, Placed] = {}
        shape = input_shape
        for index in order:
            message = layers[index]
            kind = message.WhichOneof("kind") or ""
            place = f"{self._place}[{index}]"
            if kind not in LAYERS:
                raise self._fault_type(f"{place}: names none of {', '.join(LAYERS)}")
            if traits_of(LAYERS[kind]).takes is Takes.TOKENS and (nested or index > 0):
                raise self._fault_type(f"{place}.{kind}: takes tokens, so it must be the first layer of the model")
            try:
                layer = LAYERS[kind](getattr(message, kind), shape)
            except ModelFault as fault:
                raise self._fault(index, kind, fault) from None
            placed[index] = Placed(f"{index}.{kind}", kind, layer)
            shape = layer.output_shape
        for before, behind in pairwise(order):
            tiles.join(placed[before].layer, placed[behind].layer)
        return placed

    def _fault(self, index: int, kind: str, fault: ModelFault) -> ModelFault:
        """A layer's fault with its place before it."""
        joint = "." if isinstance(fault, NestedFault) else ": "
        return self._fault_type(f"{self._place}[{index}].{kind}{joint}{fault}")


def _cancelled_biases(running: Sequence[Placed]) -> dict[str, tuple[int, "BatchNorm"]]:
    """The biases that a batch_norm behind them takes off again with the mean: by name, the layer's place and what does.

    Each adds one number to a channel, and in training batch_norm subtracts the channel's mean: the gradient is 0. What
    rounding leaves in its place would become full steps of an optimizer that divides by the gradient's size, other ones
    on each number of ranks, and go into the running mean.
    """
    from worker.engine.layers.batch_norm import BatchNorm

    cancelled: dict[str, tuple[int, BatchNorm]] = {}
    for index, placed in enumerate(running):
        layers = (after.layer for after in running[index + 1 :])
        behind = next((layer for layer in layers if not traits_of(layer).keeps_channel_bias), None)
        bias = traits_of(placed.layer).channel_bias
        if isinstance(behind, BatchNorm) and bias:
            cancelled[f"{placed.place}.{bias}"] = index, behind
    return cancelled


def _elements(layer: Layer) -> int:
    return sum(math.prod(parameter.shape) for parameter in layer.parameters)


def _values_per_sample(layer: Layer) -> int:
    inside = getattr(layer, "inside", None)
    return math.prod(layer.output_shape) + (inside.values_per_sample if isinstance(inside, Chain) else 0)


def _stateful(placed: Placed) -> StatefulLayer | None:
    """The layer where it has state, or holds a layer that has."""
    return placed.layer if isinstance(placed.layer, StatefulLayer) and placed.layer.state else None


def _follower(behind: Sequence[Placed]) -> Layer | None:
    """The first layer behind for which the size of a weight matters."""
    return next((placed.layer for placed in behind if not traits_of(placed.layer).passes_scale), None)


def _within(placed: Placed, behind: Layer | None, parameter: Parameter) -> Parameter:
    """A layer's parameter under its name in the chain, told what its initial values need to know of the layer behind.

    Within a residual layer its own chain has told it.
    """
    parameter = parameter._replace(name=f"{placed.place}.{parameter.name}")
    if isinstance(getattr(placed.layer, "inside", None), Chain):
        return parameter
    traits = traits_of(behind)
    return parameter._replace(is_rectified=traits.is_rectifier, slope=traits.slope)
