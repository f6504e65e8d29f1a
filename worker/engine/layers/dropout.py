"""Dropout, with masks that do not depend on the number of ranks.

Rules: a mask is a function of seed, layer, step and a sample's place in the global batch. Each sample owns a run of a
PCG64 stream that starts at place x run, and a rank advances to the run of its first sample. Only raw output is used,
which is the same under every NumPy version (NEP 19). In evaluation nothing is done.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from protos import job_pb2
from worker.engine.layers.layer import Moment, Takes, Traits
from worker.engine.params import FloatArray, Parameter, Shape
from worker.errors import ModelFault

STREAM = 2  # of the seed; 0, 1 and 3 are those of data/sharding.py
CHOICES = 1 << 16  # a value is dropped or not by 16 random bits, four values to a word
WORDS_AT_ONCE = 1 << 14  # 128 KB of random words, which stay in cache


class Dropout:
    """y = x k / (1 - p), k = 0 with probability p and else 1, so that E[y] = x. (Srivastava et al. 2014, section 10.)

    p is the rate to the nearest 1/65536, in the divisor too.
    """

    traits: ClassVar[Traits] = Traits(Takes.ANYTHING, passes_scale=True)
    reads_output: ClassVar[bool] = False
    works_in_place: ClassVar[bool] = True
    parameters: tuple[Parameter, ...] = ()

    def __init__(self, options: job_pb2.DropoutLayer, input_shape: Shape) -> None:
        """ModelFault when the rate is absent or so near 1 that nothing would be left."""
        if not options.HasField("rate"):
            raise ModelFault("rate: is absent, a resolved job has it")
        self.threshold = round(options.rate * CHOICES)
        if self.threshold >= CHOICES:
            raise ModelFault(f"rate: {options.rate} is so near 1 that every value would be dropped")
        self.output_shape: Shape = input_shape
        self.values_per_sample = math.prod(input_shape)
        self.words_per_sample = -(-self.values_per_sample // 4)
        self.moment: Moment | None = None

    def attach(self, values: Sequence[FloatArray], gradients: Sequence[FloatArray]) -> None:
        """Nothing to attach."""

    def reserve(self, batch_size: int, dtype: npt.DTypeLike, in_place: bool) -> None:
        """k / (1 - p) for each value, and the output unless it goes over the input."""
        self.factor = np.empty((batch_size, self.values_per_sample), dtype)
        self.output = None if in_place else np.empty((batch_size, *self.output_shape), dtype)

    def begin(self, moment: Moment | None) -> None:
        """Training at this moment, or evaluation (None)."""
        self.moment = moment if self.threshold else None

    def forward(self, x: FloatArray) -> FloatArray:
        """y = x k / (1 - p) in training, x otherwise."""
        y = x if self.output is None else self.output[: len(x)]
        if self.moment is None:
            if y is not x:
                np.copyto(y, x)
            return y
        self._draw(self.moment, len(x))
        return np.multiply(x, self.factor[: len(x)].reshape(x.shape), out=y)

    def backward_parameters(self, dy: FloatArray) -> None:
        """Nothing is trained."""

    def backward_input(self, dy: FloatArray) -> FloatArray:
        """dy/dx = k / (1 - p); 1 where nothing is dropped."""
        if self.moment is None:
            return dy
        return np.multiply(dy, self.factor[: len(dy)].reshape(dy.shape), out=dy)

    def _draw(self, moment: Moment, samples: int) -> None:
        """Write k / (1 - p) for each value of the batch."""
        sequence = np.random.SeedSequence(moment.seed, spawn_key=(STREAM, moment.step, *moment.path))
        stream = np.random.PCG64(sequence)
        stream.advance(moment.first * self.words_per_sample)
        scale = CHOICES / (CHOICES - self.threshold)
        at_once = max(1, WORDS_AT_ONCE // self.words_per_sample)
        for start in range(0, samples, at_once):
            factor = self.factor[start : min(start + at_once, samples)]
            words = stream.random_raw(len(factor) * self.words_per_sample)
            bits = words.view(np.uint16).reshape(len(factor), -1)[:, : self.values_per_sample]
            np.greater_equal(bits, np.uint16(self.threshold), out=factor)
            np.multiply(factor, scale, out=factor)
