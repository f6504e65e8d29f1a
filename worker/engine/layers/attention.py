"""Multi-head self-attention, with its projections in and out.

Rules: a sample is (time, features); head h owns columns h d .. (h + 1) d of the queries, keys, values and of what goes
into the projection out. Scores are done a sample at a time, which stay in cache while all passes go over them; their
softmax is the only array of (time, time) that is kept for backward.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from protos import job_pb2
from worker.engine.params import FloatArray, Parameter, Shape
from worker.errors import ModelFault


class Attention:
    """softmax(Q K^T / sqrt(d)) V for each head, with Q, K, V = X W + b. (Vaswani et al. 2017, equation 1.)

    W (features, 3 features) holds the columns of Q, of K and of V, one behind the other. Causal: the scores of later
    positions are minus infinity, so that their softmax is 0.
    """

    reads_output: ClassVar[bool] = False
    works_in_place: ClassVar[bool] = False

    def __init__(self, options: job_pb2.AttentionLayer, input_shape: Shape) -> None:
        """ModelFault unless a sample is (time, features) and the heads divide the features."""
        if len(input_shape) != 2 or math.prod(input_shape) < 1:
            raise ModelFault(f"got samples of shape {input_shape}, needs (time, features): put an embedding before it")
        self.heads = options.heads
        self.time, self.features = input_shape
        if self.heads < 1 or self.features % self.heads:
            raise ModelFault(f"heads: {self.heads} does not divide the {self.features} features of a sample")
        self.width = self.features // self.heads  # d: of a head
        self.scale = 1.0 / math.sqrt(self.width)
        self.causal = options.causal
        self.output_shape: Shape = input_shape
        k = self.features
        self.parameters: tuple[Parameter, ...] = (
            # Three square matrices beside each other, each drawn as one by itself.
            Parameter("in_weight", (k, 3 * k), fan_in=k, fan_out=k),
            Parameter("in_bias", (3 * k,), fan_in=0, fan_out=0),
            Parameter("out_weight", (k, k), fan_in=k, fan_out=k),
            Parameter("out_bias", (k,), fan_in=0, fan_out=0),
        )

    def attach(self, values: Sequence[FloatArray], gradients: Sequence[FloatArray]) -> None:
        """Take views, in the order of `parameters`, and the gradients alike."""
        self.in_weight, self.in_bias, self.out_weight, self.out_bias = values
        if gradients:
            self.d_in_weight, self.d_in_bias, self.d_out_weight, self.d_out_bias = gradients

    def reserve(self, batch_size: int, dtype: npt.DTypeLike, in_place: bool) -> None:
        """Q, K, V and their gradients, the attention, what it gathered, the output, and a sample's scores."""
        shape = (batch_size, self.time, self.features)
        self.projected = np.empty((batch_size, self.time, 3 * self.features), dtype)
        self.d_projected = np.empty_like(self.projected)
        self.attention = np.empty((batch_size, self.heads, self.time, self.time), dtype)
        self.gathered, self.y, self.dx = (np.empty(shape, dtype) for _ in range(3))
        self.scores = np.empty(self.attention.shape[1:], dtype)
        self.row = np.empty((self.heads, self.time, 1), dtype)
        self.ones = np.ones(batch_size * self.time, dtype)
        self.along_time = np.ones(self.time, dtype)
        # Added to the scores: minus infinity above the diagonal.
        self.hidden = np.triu(np.full((self.time, self.time), -np.inf, dtype), 1) if self.causal else None

    def forward(self, x: FloatArray) -> FloatArray:
        """x (n, time, features) -> the same shape. Q is kept divided by sqrt(d): fewer values than the scores."""
        n = len(x)
        self.x = x.reshape(-1, self.features)
        projected, gathered, y = self.projected[:n], self.gathered[:n], self.y[:n]
        rows = projected.reshape(-1, 3 * self.features)
        np.matmul(self.x, self.in_weight, out=rows)
        np.add(rows, self.in_bias, out=rows)
        np.multiply(rows[:, : self.features], self.scale, out=rows[:, : self.features])
        for sample in range(n):
            q, k, v = self._by_head(projected[sample], 3)
            attention = self.attention[sample]
            np.matmul(q, k.transpose(0, 2, 1), out=attention)
            if self.hidden is not None:
                np.add(attention, self.hidden, out=attention)
            np.max(attention, axis=2, keepdims=True, out=self.row)
            np.subtract(attention, self.row, out=attention)
            np.exp(attention, out=attention)
            np.matmul(attention, self.along_time, out=self.row[:, :, 0])
            np.divide(attention, self.row, out=attention)
            np.matmul(attention, v, out=self._by_head(gathered[sample], 1)[0])
        outputs = y.reshape(-1, self.features)
        np.matmul(gathered.reshape(-1, self.features), self.out_weight, out=outputs)
        np.add(outputs, self.out_bias, out=outputs)
        return y

    def backward_parameters(self, dy: FloatArray) -> None:
        """Back through the projection out, each head, and into the weights of the projection in.

        With A = softmax(S), S = Q K^T / sqrt(d) and G = A V for a head:
            dV = A^T dG        dA = dG V^T
            dS_ts = A_ts (dA_ts - sum_u A_tu dA_tu), the softmax's Jacobian, where
            sum_u A_tu dA_tu = sum_j dG_tj sum_u A_tu V_uj = sum_j dG_tj G_tj: d products in place of `time`
            dQ = dS K / sqrt(d)        dK = dS^T Q / sqrt(d)
        The projections are linear layers: dW = X^T dY, db = the column sums, dX = dY W^T.
        """
        n = len(dy)
        d_outputs = dy.reshape(-1, self.features)
        gathered, d_projected = self.gathered[:n], self.d_projected[:n]
        ones = self.ones[: len(d_outputs)]
        np.matmul(gathered.reshape(-1, self.features).T, d_outputs, out=self.d_out_weight)
        np.dot(ones, d_outputs, out=self.d_out_bias)
        d_gathered = self.dx[:n]  # its place is free until backward_input
        np.matmul(d_outputs, self.out_weight.T, out=d_gathered.reshape(-1, self.features))
        for sample in range(n):
            q, k, v = self._by_head(self.projected[sample], 3)
            dq, dk, dv = self._by_head(d_projected[sample], 3)
            (g,), (dg,) = self._by_head(gathered[sample], 1), self._by_head(d_gathered[sample], 1)
            attention, d_scores = self.attention[sample], self.scores
            np.matmul(attention.transpose(0, 2, 1), dg, out=dv)
            np.matmul(dg, v.transpose(0, 2, 1), out=d_scores)
            np.einsum("htj,htj->ht", dg, g, out=self.row[:, :, 0])
            np.subtract(d_scores, self.row, out=d_scores)
            np.multiply(d_scores, attention, out=d_scores)
            np.matmul(d_scores, k, out=dq)
            np.matmul(d_scores.transpose(0, 2, 1), q, out=dk)  # q is divided by sqrt(d) already
        d_rows = d_projected.reshape(-1, 3 * self.features)
        np.multiply(d_rows[:, : self.features], self.scale, out=d_rows[:, : self.features])
        np.matmul(self.x.T, d_rows, out=self.d_in_weight)
        np.dot(ones, d_rows, out=self.d_in_bias)

    def backward_input(self, dy: FloatArray) -> FloatArray:
        """dX = dZ W^T with dZ the gradient of Q, K and V, which backward_parameters has left."""
        dx = self.dx[: len(dy)]
        d_rows = self.d_projected[: len(dy)].reshape(-1, 3 * self.features)
        np.matmul(d_rows, self.in_weight.T, out=dx.reshape(-1, self.features))
        return dx

    def _by_head(self, sample: FloatArray, parts: int) -> FloatArray:
        """(time, parts x features) seen as (parts, heads, time, d), nothing copied."""
        return sample.reshape(self.time, parts, self.heads, self.width).transpose(1, 2, 0, 3)
