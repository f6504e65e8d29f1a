"""A model: layers in a row and a loss, over one flat parameter vector and one flat gradient vector.

Rules: everything that can be wrong is found when the model is made, before an array exists. A step allocates nothing
big. Values that overflow are not warned about here: they end in a loss that is not finite, which the training loop
reports by step. `backward` belongs to the `forward` before it, and the features and targets of that
`forward` must not change in between.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from protos import job_pb2
from worker.engine.chain import Chain, Placed
from worker.engine.initializers import fill
from worker.engine.layers.layer import Finished, Moment, Reduce, Sums
from worker.engine.losses import LOSSES, Loss, Totals
from worker.engine.params import FloatArray, ParameterSlot, Shape, lay_out, layout_digest, view
from worker.errors import DataFault, ModelFault

__all__ = ["Model", "ParameterSlot", "Totals"]

# A last layer that the loss applies itself: with both, training goes slowly wrong and no error shows.
ALREADY_IN_LOSS = {("softmax_cross_entropy", "softmax"), ("binary_cross_entropy", "sigmoid")}


def alone(sums: Sums) -> None:
    """The sums over the ranks of one process: its own."""


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
        self._chain = Chain(layers, sample_shape)
        self.output_shape: Shape = self._chain.output_shape

        self.loss_kind = loss.WhichOneof("kind") or ""
        if self.loss_kind not in LOSSES:
            raise ModelFault(f"loss: names none of {', '.join(LOSSES)}")
        last_kind = self._chain.layers[-1].kind
        if (self.loss_kind, last_kind) in ALREADY_IN_LOSS:
            place = f"model[{len(layers) - 1}].{last_kind}"
            raise ModelFault(f"{place}: {self.loss_kind} takes logits and applies it itself: leave this layer out")
        try:
            self._loss: Loss = LOSSES[self.loss_kind](getattr(loss, self.loss_kind), self.output_shape)
        except ModelFault as fault:
            raise ModelFault(f"loss.{self.loss_kind}: {fault}") from None

        self.slots: tuple[ParameterSlot, ...] = lay_out(
            [(parameter.name, parameter) for parameter in self._chain.parameters]
        )
        if not self.slots:
            raise ModelFault("model: no layer has parameters to train: add a dense layer")
        self.parameter_count = self.slots[-1].stop
        self.layout_digest = layout_digest(self.slots)
        # What training changes and no gradient does: running statistics.
        self.state_slots: tuple[ParameterSlot, ...] = lay_out([(array.name, array) for array in self._chain.state])
        self.state_count = self.state_slots[-1].stop if self.state_slots else 0
        self.sum_count = self._chain.sum_count
        self.synchronized = self._chain.synchronized  # ranks exchange sums within forward and backward
        self._values: dict[str, FloatArray] = {}
        self._gradient: FloatArray | None = None
        self._capacity = 0
        self._samples: int | None = None  # of the last forward that backward may follow
        self._together = False  # that forward called `reduce`, and so will backward

    def attach(
        self,
        parameters: FloatArray,
        gradient: FloatArray | None = None,
        sums: Sums | None = None,
        reduce: Reduce = alone,
    ) -> None:
        """Take 1-D vectors of `parameter_count` elements; layers get views of them and nothing is copied.

        The state is made here, at its initial values.

        Args:
            sums: (sum_count,), 0; a training `forward` adds this rank's to them, and they are to be summed over all
                ranks before `update_state`.
            reduce: adds up what synchronized layers exchange over all ranks, at once and in place.
        """
        for vector in (parameters,) if gradient is None else (parameters, gradient):
            if vector.shape != (self.parameter_count,) or vector.dtype != self.dtype or not vector.flags.c_contiguous:
                raise ValueError(f"needs a contiguous {self.dtype} vector of {self.parameter_count} elements")
        self._values = {slot.name: view(parameters, slot) for slot in self.slots}
        self._gradient = gradient
        gradients = [] if gradient is None else [view(gradient, slot) for slot in self.slots]
        self._chain.attach(list(self._values.values()), gradients)
        self.state = np.empty(self.state_count, self.dtype)
        for slot, array in zip(self.state_slots, self._chain.state, strict=True):
            view(self.state, slot)[...] = array.initial
        sums = np.zeros(self.sum_count) if sums is None else sums
        self._chain.attach_state(list(self.named_state().values()), sums, reduce)

    @property
    def values_per_sample(self) -> int:
        """How many values the layers put out for one sample: about what their buffers hold for it."""
        return self._chain.values_per_sample

    @property
    def layers(self) -> tuple[Placed, ...]:
        """The layers, first to last."""
        return tuple(self._chain.layers)

    def named_parameters(self) -> dict[str, FloatArray]:
        """Views of the attached parameters in layer order, under names such as `0.dense.weight`."""
        return dict(self._values)

    def named_state(self) -> dict[str, FloatArray]:
        """Views of the state in layer order, under names such as `1.batch_norm.running_mean`."""
        return {slot.name: view(self.state, slot) for slot in self.state_slots}

    def update_state(self) -> None:
        """After the sums of a step have been added up over all ranks: the state after it, the same on every rank."""
        self._chain.update_state()

    def initialize(self, seed: int) -> None:
        """Write the initial parameters in place, each from (seed, name) alone."""
        for parameter in self._chain.parameters:
            fill(self._values[parameter.name], parameter, seed)

    def reserve(self, batch_size: int) -> None:
        """Make all buffers for up to `batch_size` samples; a larger batch later makes larger ones."""
        overwritable = self._chain.reserve(batch_size, self.dtype)
        self._loss.reserve(batch_size, self.dtype, in_place=overwritable)
        self._capacity = batch_size

    def forward(
        self,
        features: FloatArray,
        targets: npt.NDArray[Any],
        moment: Moment | None = None,
        observe: Callable[[FloatArray, npt.NDArray[Any]], None] | None = None,
    ) -> Totals:
        """The loss over features (n, *sample_shape) of `dtype` and targets (n,), (n, T) or (n, k). n may be 0.

        `moment` makes it a training step: layers that act otherwise in training do so. `observe` sees the last layer's
        outputs and the targets before the loss may write over the former.
        """
        self._samples = len(features)
        # What ranks do together in a step, they do on an empty batch too: the others wait for them.
        self._together = self.synchronized and moment is not None
        if self._samples == 0:
            if self._together:
                self._run(features, moment)
            return Totals(0.0, 0.0, 0)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            outputs = self._run(features, moment)
            if observe is not None:
                observe(outputs, targets)
            return self._loss.forward(outputs, targets)

    def backward(self, finished: Finished | None = None) -> None:
        """Write the gradient, summed over the samples of the last forward, layer by layer from the last.

        Nothing before the first layer with parameters needs a gradient.

        Args:
            finished: called from within with the element from which on the gradient is final, until that is 0.
        """
        if self._gradient is None or self._samples is None:
            raise RuntimeError("backward needs an attached gradient and follows forward")
        if self._samples == 0:
            if self._together:
                self._chain.backward_parameters(np.empty((0, *self.output_shape), self.dtype))
            self._gradient[...] = 0  # only now: on an empty batch a layer may leave what it had written before
            if finished is not None:
                finished(0)
            return
        with np.errstate(over="ignore", invalid="ignore"):
            self._chain.backward_parameters(self._loss.backward(), finished)
        self._samples = None

    def outputs(self, features: FloatArray) -> FloatArray:
        """Predictions (n, *output_shape) in a new array: probabilities for the cross-entropies, values otherwise."""
        self._samples = None
        if len(features) == 0:
            return np.empty((0, *self.output_shape), self.dtype)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            predictions = self._run(features, None).copy()
            self._loss.predict(predictions)
        return predictions

    def check_batch(self, at_once: int, batch: int) -> None:
        """ModelFault naming the layer that so few samples, in a rank at once and in the whole batch, cannot train."""
        self._chain.check_batch(at_once, batch)

    def check_targets(self, targets: npt.NDArray[Any], place: str, first: int = 0) -> None:
        """DataFault, naming `place` and the sample, where targets cannot belong to this model's outputs.

        `first` is the number of the first of them.
        """
        self._loss.check_targets(targets, place, first)

    def _run(self, features: FloatArray, moment: Moment | None) -> FloatArray:
        """The last layer's output."""
        if features.shape[1:] != self.sample_shape:
            raise DataFault(f"samples have shape {features.shape[1:]}, the model was made for {self.sample_shape}")
        if max(1, len(features)) > self._capacity:
            self.reserve(max(1, len(features)))
        self._chain.begin(moment)
        return self._chain.forward(features)
