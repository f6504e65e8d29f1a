"""Layer normalization: the values along the last axis of a sample brought to mean 0 and variance 1.

Rules: the last axis of (features,), (time, features) or (height, width, channels) is normalized by itself, so a sample
never sees another. The rows are done a block at a time, which all passes find in cache.
"""

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from protos import job_pb2
from worker.engine.layers.layer import Takes, Traits
from worker.engine.params import FloatArray, Parameter, Shape
from worker.errors import ModelFault

BLOCK_ELEMENTS = 1 << 15  # 128 KB of float32


class LayerNorm:
    """y_j = w_j xhat_j + b_j, xhat_j = (x_j - mean(x)) / sqrt(var(x) + epsilon). (Ba, Kiros and Hinton 2016.)"""

    traits: ClassVar[Traits] = Traits(Takes.SEQUENCES, channel_bias="bias")
    reads_output: ClassVar[bool] = False
    works_in_place: ClassVar[bool] = True

    def __init__(self, options: job_pb2.LayerNormLayer, input_shape: Shape) -> None:
        """ModelFault where there are not several values to normalize, or no epsilon: as 0 it would divide by 0."""
        if not options.HasField("epsilon"):
            raise ModelFault("epsilon: is absent, a resolved job has it")
        if math.prod(input_shape) < 1 or not input_shape:
            raise ModelFault(f"got samples of shape {input_shape}, which hold no values; needs at least one")
        if input_shape[-1] == 1:
            raise ModelFault(
                f"got samples of shape {input_shape}, and normalizes the last axis, where one value alone becomes 0 "
                "whatever it was: put flatten before it, or a layer that makes more of it"
            )
        self.epsilon = options.epsilon
        self.output_shape: Shape = input_shape
        self.units = input_shape[-1]
        self.rows_per_sample = math.prod(input_shape[:-1])
        self.block = max(1, BLOCK_ELEMENTS // self.units)
        self.parameters: tuple[Parameter, ...] = (
            Parameter("weight", (self.units,), fan_in=0, fan_out=0, initial=1.0),
            Parameter("bias", (self.units,), fan_in=0, fan_out=0),
        )

    def attach(self, values: Sequence[FloatArray], gradients: Sequence[FloatArray]) -> None:
        """Take views: weight (units,), bias (units,), and the gradients alike."""
        self.weight, self.bias = values
        if gradients:
            self.d_weight, self.d_bias = gradients

    def reserve(self, batch_size: int, dtype: npt.DTypeLike, in_place: bool) -> None:
        """xhat and 1/sqrt(var + epsilon) of each row, the output unless it goes over the input, and a block."""
        rows = batch_size * self.rows_per_sample
        self.normalized = np.empty((rows, self.units), dtype)
        self.inverse = np.empty(rows, dtype)
        self.output = None if in_place else np.empty((batch_size, *self.output_shape), dtype)
        self.scratch = np.empty((min(self.block, rows), self.units), dtype)
        self.row_scratch = np.empty(min(self.block, rows), dtype)
        self.ones = np.ones(rows, dtype)
        self.averaging = np.full(self.units, 1.0 / self.units, dtype)

    def forward(self, x: FloatArray) -> FloatArray:
        """Y = xhat w + b for each row; means are products with 1/units, which BLAS does faster than a reduction."""
        y = x if self.output is None else self.output[: len(x)]
        rows, y_rows = x.reshape(-1, self.units), y.reshape(-1, self.units)
        for block in self._blocks(len(rows)):
            normalized, inverse = self.normalized[block], self.inverse[block]
            np.dot(rows[block], self.averaging, out=inverse)
            np.subtract(rows[block], inverse[:, None], out=normalized)
            np.einsum("ij,ij->i", normalized, normalized, out=inverse)
            np.multiply(inverse, 1.0 / self.units, out=inverse)
            np.add(inverse, self.epsilon, out=inverse)
            np.sqrt(inverse, out=inverse)
            np.divide(1, inverse, out=inverse)
            np.multiply(normalized, inverse[:, None], out=normalized)
            np.multiply(normalized, self.weight, out=y_rows[block])
            np.add(y_rows[block], self.bias, out=y_rows[block])
        return y

    def backward_parameters(self, dy: FloatArray) -> None:
        """dL/dw_j = sum over rows of dy_j xhat_j, dL/db_j = sum over rows of dy_j."""
        rows = dy.reshape(-1, self.units)
        np.einsum("ij,ij->j", rows, self.normalized[: len(rows)], out=self.d_weight)
        np.dot(self.ones[: len(rows)], rows, out=self.d_bias)

    def backward_input(self, dy: FloatArray) -> FloatArray:
        """dx = r (g - mean(g) - xhat mean(g xhat)) with g = dy w and r = 1/sqrt(var + epsilon).

        With c = x - mean(x) and k units: dc_j/dx_i = [i = j] - 1/k, and dr/dx_i = -1/2 r^3 (2/k) c_i = -r^2 xhat_i / k
        since the mean of c is 0. xhat_j = c_j r, so dxhat_j/dx_i = r ([i = j] - 1/k) - r xhat_j xhat_i / k, and the
        sum over j of g_j times this is the line above.
        """
        rows = dy.reshape(-1, self.units)
        for block in self._blocks(len(rows)):
            g, normalized = rows[block], self.normalized[block]
            mean, projected = self.row_scratch[: len(g)], self.scratch[: len(g)]
            np.multiply(g, self.weight, out=g)
            np.einsum("ij,ij->i", g, normalized, out=mean)
            np.multiply(mean, 1.0 / self.units, out=mean)
            np.multiply(normalized, mean[:, None], out=projected)
            np.dot(g, self.averaging, out=mean)
            np.subtract(g, mean[:, None], out=g)
            np.subtract(g, projected, out=g)
            np.multiply(g, self.inverse[block][:, None], out=g)
        return dy

    def _blocks(self, rows: int) -> Iterator[slice]:
        return (slice(start, min(start + self.block, rows)) for start in range(0, rows, self.block))
