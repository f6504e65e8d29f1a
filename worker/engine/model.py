"""A model: layers in a row and a loss, over one flat parameter vector and one flat gradient vector.

Rules: everything that can be wrong with the layers is found when the model is made, before an array exists. A step
allocates nothing big. Values that overflow are not warned about here: they end in a loss that is not finite, which the
training loop reports by step. `backward` belongs to the `forward` before it, and the features and targets of that
`forward` must not change in between.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from protos import job_pb2
from worker.engine.initializers import TRANSPARENT, fill
from worker.engine.layers import LAYERS
from worker.engine.layers.layer import Layer
from worker.engine.losses import LOSSES, Loss, Totals
from worker.engine.params import FloatArray, Parameter, ParameterSlot, Shape, lay_out, layout_digest, view
from worker.errors import DataFault, ModelFault

__all__ = ["Model", "ParameterSlot", "Totals"]

# A last layer that the loss applies itself: with both, training goes slowly wrong and no error shows.
ALREADY_IN_LOSS = {("softmax_cross_entropy", "softmax"), ("binary_cross_entropy", "sigmoid")}


class Placed(NamedTuple):
    """A layer and where it stands."""

    place: str  # "2.dense"
    kind: str
    layer: Layer
    options: Any  # its message in the job file


class Model:
    """Layers of a resolved job, made for samples of one shape."""

    def __init__(
        self,
        layers: Sequence[job_pb2.Layer],
        loss: job_pb2.Loss,
        sample_shape: Shape,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        """ModelFault naming the layer (`model[2].dense`), what it got and what it needs. Allocates no arrays."""
        self.dtype = np.dtype(dtype)
        self.sample_shape = sample_shape
        self._layers = _build(layers, sample_shape)
        self.output_shape: Shape = self._layers[-1].layer.output_shape

        self.loss_kind = loss.WhichOneof("kind") or ""
        if self.loss_kind not in LOSSES:
            raise ModelFault(f"loss: names none of {', '.join(LOSSES)}")
        if (self.loss_kind, self._layers[-1].kind) in ALREADY_IN_LOSS:
            place = f"model[{len(layers) - 1}].{self._layers[-1].kind}"
            raise ModelFault(f"{place}: {self.loss_kind} takes logits and applies it itself: leave this layer out")
        try:
            self._loss: Loss = LOSSES[self.loss_kind](getattr(loss, self.loss_kind), self.output_shape)
        except ModelFault as fault:
            raise ModelFault(f"loss.{self.loss_kind}: {fault}") from None

        self.slots: tuple[ParameterSlot, ...] = lay_out(
            [(name, parameter) for name, parameter, _ in self._parameters()]
        )
        if not self.slots:
            raise ModelFault("model: no layer has parameters to train: add a dense layer")
        self.parameter_count = self.slots[-1].stop
        self.layout_digest = layout_digest(self.slots)
        # Nothing before the first layer with parameters needs a gradient.
        self._first_trained = next(i for i, placed in enumerate(self._layers) if placed.layer.parameters)
        self._values: dict[str, FloatArray] = {}
        self._gradient: FloatArray | None = None
        self._capacity = 0
        self._samples: int | None = None  # of the last forward that backward may follow

    def attach(self, parameters: FloatArray, gradient: FloatArray | None = None) -> None:
        """Take 1-D vectors of `parameter_count` elements; layers get views of them and nothing is copied."""
        for vector in (parameters,) if gradient is None else (parameters, gradient):
            if vector.shape != (self.parameter_count,) or vector.dtype != self.dtype or not vector.flags.c_contiguous:
                raise ValueError(f"needs a contiguous {self.dtype} vector of {self.parameter_count} elements")
        self._values = {slot.name: view(parameters, slot) for slot in self.slots}
        self._gradient = gradient
        gradients = {} if gradient is None else {slot.name: view(gradient, slot) for slot in self.slots}
        for place, _, layer, _ in self._layers:
            names = [f"{place}.{parameter.name}" for parameter in layer.parameters]
            layer.attach([self._values[name] for name in names], [gradients[name] for name in names if gradients])

    def named_parameters(self) -> dict[str, FloatArray]:
        """Views of the attached parameters in layer order, under names such as `0.dense.weight`."""
        return dict(self._values)

    def initialize(self, seed: int) -> None:
        """Write the initial parameters in place, each from (seed, name) alone."""
        for name, parameter, following in self._parameters():
            kind = following.kind if following else ""
            slope = following.options.alpha if following and kind == "leaky_relu" else 0.0
            fill(self._values[name], parameter, name, seed, kind, slope)

    def reserve(self, batch_size: int) -> None:
        """Make all buffers for up to `batch_size` samples; a larger batch later makes larger ones."""
        overwritable = False  # whether the next layer may write over its input; never over the caller's features
        for _, _, layer, _ in self._layers:
            layer.reserve(batch_size, self.dtype, in_place=overwritable and layer.works_in_place)
            overwritable = not layer.reads_output
        self._loss.reserve(batch_size, self.dtype, in_place=overwritable)
        self._capacity = batch_size

    def forward(self, features: FloatArray, targets: npt.NDArray[Any]) -> Totals:
        """The loss over features (n, *sample_shape) of `dtype` and targets (n,) or (n, k). n may be 0."""
        self._samples = len(features)
        if self._samples == 0:
            return Totals(0.0, 0.0, 0)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            return self._loss.forward(self._run(features), targets)

    def backward(self) -> None:
        """Write the gradient, summed over the samples of the last forward, layer by layer from the last.

        delta^[L] comes from the loss; each layer turns its output's delta into its parameters' gradient and into the
        delta of the layer before (seed document, steps 3 and 4).
        """
        if self._gradient is None or self._samples is None:
            raise RuntimeError("backward needs an attached gradient and follows forward")
        if self._samples == 0:
            self._gradient[...] = 0
            return
        with np.errstate(over="ignore", invalid="ignore"):
            delta = self._loss.backward()
            for index in range(len(self._layers) - 1, self._first_trained - 1, -1):
                layer = self._layers[index].layer
                if layer.parameters:
                    layer.backward_parameters(delta)
                if index > self._first_trained:
                    delta = layer.backward_input(delta)
        self._samples = None

    def outputs(self, features: FloatArray) -> FloatArray:
        """Predictions (n, *output_shape) in a new array: probabilities for the cross-entropies, values otherwise."""
        self._samples = None
        if len(features) == 0:
            return np.empty((0, *self.output_shape), self.dtype)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            predictions = self._run(features).copy()
            self._loss.predict(predictions)
        return predictions

    def check_targets(self, targets: npt.NDArray[Any], place: str) -> None:
        """DataFault, naming `place` and the sample, where targets cannot belong to this model's outputs."""
        self._loss.check_targets(targets, place)

    def _run(self, features: FloatArray) -> FloatArray:
        """The last layer's output."""
        if features.shape[1:] != self.sample_shape:
            raise DataFault(f"samples have shape {features.shape[1:]}, the model was made for {self.sample_shape}")
        if len(features) > self._capacity:
            self.reserve(len(features))
        activation = features
        for _, _, layer, _ in self._layers:
            activation = layer.forward(activation)
        return activation

    def _parameters(self) -> list[tuple[str, Parameter, Placed | None]]:
        """Every parameter under its full name, with the layer that its values reach first (see TRANSPARENT)."""
        named: list[tuple[str, Parameter, Placed | None]] = []
        follower: Placed | None = None
        for placed in reversed(self._layers):
            parameters = [(f"{placed.place}.{parameter.name}", parameter) for parameter in placed.layer.parameters]
            named[:0] = [(name, parameter, follower) for name, parameter in parameters]
            follower = follower if placed.kind in TRANSPARENT else placed
        return named


def _build(layers: Sequence[job_pb2.Layer], sample_shape: Shape) -> list[Placed]:
    """The layers one behind the other, each made for the shape the one before puts out."""
    if not layers:
        raise ModelFault("model: has no layers")
    placed: list[Placed] = []
    shape = sample_shape
    for index, message in enumerate(layers):
        kind = message.WhichOneof("kind") or ""
        if kind not in LAYERS:
            raise ModelFault(f"model[{index}]: names none of {', '.join(LAYERS)}")
        options = getattr(message, kind)
        try:
            layer = LAYERS[kind](options, shape)
        except ModelFault as fault:
            raise ModelFault(f"model[{index}].{kind}: {fault}") from None
        placed.append(Placed(f"{index}.{kind}", kind, layer, options))
        shape = layer.output_shape
    return placed
