"""Activations f(x) = x g(x) that let x through by a gate g between 0 and 1: GELU and SiLU.

Rules: f is not monotonic, so f' cannot be had from f; it shares its exponentials with f and is found and kept together
with it. They work through their values in slices that stay in cache, since each takes many passes.
"""

import math
from collections.abc import Callable
from typing import ClassVar, Final

import numpy as np
import numpy.typing as npt

from worker.engine import functions
from worker.engine.layers.elementwise import Elementwise
from worker.engine.layers.layer import Takes, Traits
from worker.engine.params import FloatArray

# 128 KB of float32 a buffer: those of a pass lie in L2, and a pass takes several times as long as its call.
SLICE_ELEMENTS: Final = 32768


class Gated(Elementwise):
    """What the two share: `scratch` holds f' from forward to backward, so the output may be written over."""

    traits: Traits = Traits(Takes.ANYTHING, is_rectifier=True)
    reads_output: ClassVar[bool] = False
    # Called with x, y, slope and buffers: writes f(x) to y, which may be x, and f'(x) to slope.
    evaluate: Callable[..., None]

    def reserve(self, batch_size: int, dtype: npt.DTypeLike, in_place: bool) -> None:
        """Also buffers of a slice."""
        super().reserve(batch_size, dtype, in_place)
        elements = min(SLICE_ELEMENTS, max(self.scratch.size, 1))
        self.buffers = [np.empty(elements, dtype) for _ in range(3)]

    def forward(self, x: FloatArray) -> FloatArray:
        """f(x) for each element."""
        y = self.take_output(x)
        values, results, slopes = x.reshape(-1), y.reshape(-1), self.scratch[: len(x)].reshape(-1)
        for first in range(0, len(values), SLICE_ELEMENTS):
            part = slice(first, first + SLICE_ELEMENTS)
            count = len(values[part])
            self.evaluate(values[part], results[part], slopes[part], *(buffer[:count] for buffer in self.buffers))
        return y

    def backward_input(self, dy: FloatArray) -> FloatArray:
        """dL/dx = dL/dy f'(x), f' as forward found it."""
        return np.multiply(dy, self.scratch[: len(dy)], out=dy)


class Silu(Gated):
    """f(x) = x s(x), s(x) = 1 / (1 + e^-x). (Elfwing et al. 2018; Hendrycks and Gimpel 2016.)"""

    @staticmethod
    def evaluate(x: FloatArray, y: FloatArray, slope: FloatArray, *buffers: FloatArray) -> None:
        """f' = s + x s' = s + x s (1 - s) = s + f - f s."""
        gate, rest, _ = buffers
        functions.sigmoid(x, out=gate)
        np.multiply(x, gate, out=y)
        np.multiply(y, gate, out=rest)
        np.subtract(y, rest, out=slope)
        np.add(slope, gate, out=slope)


class Gelu(Gated):
    """f(x) = x P(x), P the standard normal distribution function (1 + erf(x / sqrt 2)) / 2.

    The exact form, PyTorch's default, not the one by tanh. (Hendrycks and Gimpel 2016.)
    """

    @staticmethod
    def evaluate(x: FloatArray, y: FloatArray, slope: FloatArray, *buffers: FloatArray) -> None:
        """f' = P + x p, where p = P' is the normal density e^(-x^2/2) / sqrt(2 pi).

        With the tail T = P(-|x|): P is T for x <= 0 and 1 - T for x > 0, which is |[x > 0] - T|.
        """
        size, density, tail = buffers
        np.abs(x, out=size)
        functions.normal_tail(size, density, scratch=slope, out=tail)
        np.multiply(density, 1 / math.sqrt(2 * math.pi), out=density)
        np.multiply(density, x, out=density)
        share = np.greater(x, 0, out=size)
        np.subtract(share, tail, out=share)
        np.abs(share, out=share)
        np.add(share, density, out=slope)
        np.multiply(x, share, out=y)
