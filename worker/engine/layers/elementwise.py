"""Activations a = f(z) that act on each element alone: sigmoid, tanh, ReLU, leaky ReLU, ELU, softplus.

Rules: each takes samples of any shape, trains nothing, and works in place where it may. Every derivative f'(z) is
written in terms of the output f(z), so z need not be kept; backward is the element-wise factor of the seed document's
delta^[l] = (W^[l+1])^T delta^[l+1] (*) f'(z^[l]), with the table of its section "Activation Functions & Derivatives".
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from protos import job_pb2
from worker.engine import functions
from worker.engine.layers.layer import Takes, Traits
from worker.engine.params import FloatArray, Parameter, Shape
from worker.errors import ModelFault


class Elementwise:
    """What they share: shapes stay, nothing is trained, one output buffer unless working in place."""

    traits: Traits = Traits(Takes.ANYTHING)
    reads_output: ClassVar[bool] = True
    works_in_place: ClassVar[bool] = True
    parameters: tuple[Parameter, ...] = ()

    def __init__(self, options: Any, input_shape: Shape) -> None:
        """Any shape will do."""
        self.output_shape: Shape = input_shape

    def attach(self, values: Sequence[FloatArray], gradients: Sequence[FloatArray]) -> None:
        """Nothing to attach."""

    def reserve(self, batch_size: int, dtype: npt.DTypeLike, in_place: bool) -> None:
        """A buffer for the output unless the input's will do, and one for the derivative."""
        shape = (batch_size, *self.output_shape)
        self.output = None if in_place else np.empty(shape, dtype)
        self.scratch = np.empty(shape, dtype)

    def take_output(self, x: FloatArray) -> FloatArray:
        """Where the output for x goes, kept for backward."""
        self.y: FloatArray = x if self.output is None else self.output[: len(x)]
        return self.y

    def backward_parameters(self, dy: FloatArray) -> None:
        """Nothing is trained."""


class Sigmoid(Elementwise):
    """f(x) = 1 / (1 + e^-x)."""

    def forward(self, x: FloatArray) -> FloatArray:
        """f(x) for each element."""
        y = self.take_output(x)
        functions.sigmoid(x, out=y)
        return y

    def backward_input(self, dy: FloatArray) -> FloatArray:
        """f' = f (1 - f).

        With e = e^-x: f' = e / (1 + e)^2 = 1/(1 + e) * e/(1 + e), and e/(1 + e) = 1 - f.
        """
        factor = self.scratch[: len(dy)]
        np.subtract(1, self.y, out=factor)
        np.multiply(factor, self.y, out=factor)
        return np.multiply(dy, factor, out=dy)


class Tanh(Elementwise):
    """f(x) = tanh(x)."""

    def forward(self, x: FloatArray) -> FloatArray:
        """f(x) for each element."""
        return np.tanh(x, out=self.take_output(x))

    def backward_input(self, dy: FloatArray) -> FloatArray:
        """f' = 1 - f^2.

        f = sinh/cosh, so f' = (cosh^2 - sinh^2) / cosh^2 = 1 - f^2.
        """
        factor = self.scratch[: len(dy)]
        np.multiply(self.y, self.y, out=factor)
        np.subtract(1, factor, out=factor)
        return np.multiply(dy, factor, out=dy)


class Relu(Elementwise):
    """f(x) = max(0, x)."""

    traits: Traits = Traits(Takes.ANYTHING, is_rectifier=True)

    def reserve(self, batch_size: int, dtype: npt.DTypeLike, in_place: bool) -> None:
        """The output's buffer, and where x > 0."""
        shape = (batch_size, *self.output_shape)
        self.output = None if in_place else np.empty(shape, dtype)
        self.positive = np.empty(shape, np.bool_)
        # np.maximum with a row of zeros is four times as fast as with the number 0, which NumPy does not vectorise.
        self.zeros = np.zeros(self.output_shape, dtype)

    def forward(self, x: FloatArray) -> FloatArray:
        """f(x) for each element."""
        return np.maximum(x, self.zeros, out=self.take_output(x))

    def backward_input(self, dy: FloatArray) -> FloatArray:
        """f' = 1 if x > 0 else 0, and x > 0 exactly where f(x) > 0."""
        positive = self.positive[: len(dy)]
        np.greater(self.y, 0, out=positive)
        return np.multiply(dy, positive, out=dy)


class LeakyRelu(Elementwise):
    """f(x) = max(alpha x, x) with 0 <= alpha < 1."""

    def __init__(self, options: job_pb2.LeakyReluLayer, input_shape: Shape) -> None:
        """ModelFault when alpha is absent: read as 0 it would quietly make this a ReLU."""
        super().__init__(options, input_shape)
        if not options.HasField("alpha"):
            raise ModelFault("alpha: is absent, a resolved job has it")
        self.alpha = options.alpha
        self.traits = Traits(Takes.ANYTHING, is_rectifier=True, slope=options.alpha)

    def reserve(self, batch_size: int, dtype: npt.DTypeLike, in_place: bool) -> None:
        """Also a row of alphas, for the same reason as ReLU's zeros."""
        super().reserve(batch_size, dtype, in_place)
        self.alphas = np.full(self.output_shape, self.alpha, dtype)

    def forward(self, x: FloatArray) -> FloatArray:
        """f(x) for each element."""
        scaled = self.scratch[: len(x)]
        np.multiply(x, self.alpha, out=scaled)
        return np.maximum(x, scaled, out=self.take_output(x))

    def backward_input(self, dy: FloatArray) -> FloatArray:
        """f' = 1 if x > 0 else alpha, and x > 0 exactly where f(x) > 0.

        Written as max([f > 0], alpha), which alpha < 1 makes the same.
        """
        factor = self.scratch[: len(dy)]
        np.greater(self.y, 0, out=factor)
        np.maximum(factor, self.alphas, out=factor)
        return np.multiply(dy, factor, out=dy)


class Elu(Elementwise):
    """f(x) = x if x > 0 else alpha (e^x - 1). (Clevert et al. 2016, equation 15.)"""

    traits: Traits = Traits(Takes.ANYTHING, is_rectifier=True)

    def __init__(self, options: job_pb2.EluLayer, input_shape: Shape) -> None:
        """ModelFault when alpha is absent: read as 0 it would quietly make this a ReLU."""
        super().__init__(options, input_shape)
        if not options.HasField("alpha"):
            raise ModelFault("alpha: is absent, a resolved job has it")
        self.alpha = options.alpha

    def reserve(self, batch_size: int, dtype: npt.DTypeLike, in_place: bool) -> None:
        """Also a row of zeros, as ReLU has one, and where f is positive."""
        super().reserve(batch_size, dtype, in_place)
        self.zeros = np.zeros(self.output_shape, dtype)
        self.positive = np.empty((batch_size, *self.output_shape), np.bool_)

    def forward(self, x: FloatArray) -> FloatArray:
        """max(x, 0) + alpha (e^min(x, 0) - 1): one of the two terms is 0, and no e^x overflows."""
        negative = self.scratch[: len(x)]
        np.minimum(x, self.zeros, out=negative)
        np.expm1(negative, out=negative)
        np.multiply(negative, self.alpha, out=negative)
        y = self.take_output(x)
        np.maximum(x, self.zeros, out=y)
        return np.add(y, negative, out=y)

    def backward_input(self, dy: FloatArray) -> FloatArray:
        """f' = 1 if x > 0 else f + alpha, and x > 0 exactly where f(x) > 0.

        Below zero f' = alpha e^x = alpha (e^x - 1) + alpha = f + alpha. min(f, 0) + alpha is that; where f > 0 it is
        alpha, which is right for the usual alpha = 1 and put right for others.
        """
        factor, positive = self.scratch[: len(dy)], self.positive[: len(dy)]
        np.minimum(self.y, self.zeros, out=factor)
        np.add(factor, self.alpha, out=factor)
        if self.alpha != 1:
            np.greater(self.y, 0, out=positive)
            np.copyto(factor, 1, where=positive)
        return np.multiply(dy, factor, out=dy)


class Softplus(Elementwise):
    """f(x) = log(1 + e^x). (Dugas et al. 2001.)"""

    def reserve(self, batch_size: int, dtype: npt.DTypeLike, in_place: bool) -> None:
        """Also a row of zeros, as ReLU has one."""
        super().reserve(batch_size, dtype, in_place)
        self.zeros = np.zeros(self.output_shape, dtype)

    def forward(self, x: FloatArray) -> FloatArray:
        """max(x, 0) + log(1 + e^-|x|): for x > 0, log(1 + e^x) = x + log(e^-x + 1), and no e^x overflows."""
        rest = self.scratch[: len(x)]
        np.abs(x, out=rest)
        np.negative(rest, out=rest)
        np.exp(rest, out=rest)
        np.log1p(rest, out=rest)
        y = self.take_output(x)
        np.maximum(x, self.zeros, out=y)
        return np.add(y, rest, out=y)

    def backward_input(self, dy: FloatArray) -> FloatArray:
        """f' = 1 - e^-f.

        f' = e^x / (1 + e^x) = 1 - 1 / (1 + e^x), and 1 + e^x = e^f.
        """
        factor = self.scratch[: len(dy)]
        np.negative(self.y, out=factor)
        np.expm1(factor, out=factor)
        np.multiply(dy, factor, out=dy)
        return np.negative(dy, out=dy)
