"""Multi-head self-attention, with its projections in and out.

Rules: a sample is (time, features); head h owns columns h d .. (h + 1) d of the queries, keys, values and of what goes
into the projection out. Scores are done for some samples and a block of queries at a time, which stay in cache while
all passes go over them. Causal: a block meets the keys up to its last query and no others, neither in products nor in
memory. The scores' exponentials are the only array of (time, time) that is kept for backward.
"""

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from protos import job_pb2
from worker.engine.layers.layer import NEEDS_SEQUENCE, Takes, Traits
from worker.engine.params import FloatArray, Parameter, Shape
from worker.errors import ModelFault

# Queries of a block. With 128 positions, 32 leave out 3/8 of the products, the most there is being 1/2; with smaller
# blocks the products are too small to be fast.
BLOCK_QUERIES: Final = 32
# 256 KB of float32: the scores done at a time.
SCORE_ELEMENTS: Final = 65536
# Scores no further from 0 than this need no maximum subtracted: e^40 and e^-40 are far from what float32 cannot hold.
SMALL_SCORE: Final = 40.0


class Block(NamedTuple):
    """The queries from first to last, and the keys before last: all that they see."""

    first: int
    last: int
    exponentials: FloatArray  # (n, heads, last - first, last)
    scores: FloatArray  # the same of as many samples as are done at a time; for backward


class Attention:
    """softmax(Q K^T / sqrt(d)) V for each head, with Q, K, V = X W + b. (Vaswani et al. 2017, equation 1.)

    W (features, 3 features) holds the columns of Q, of K and of V, one behind the other. Causal: the scores of later
    positions are minus infinity, so that their softmax is 0.
    """

    traits: ClassVar[Traits] = Traits(Takes.SEQUENCES, channel_bias="out_bias")
    reads_output: ClassVar[bool] = False
    works_in_place: ClassVar[bool] = False

    def __init__(self, options: job_pb2.AttentionLayer, input_shape: Shape) -> None:
        """ModelFault unless a sample is (time, features) and the heads divide the features."""
        if len(input_shape) != 2 or math.prod(input_shape) < 1:
            raise ModelFault(f"got samples of shape {input_shape}, {NEEDS_SEQUENCE}")
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
        """Q, K, V and their gradients, the exponentials, what was gathered, the output, and some samples' scores."""
        k, heads, time = self.features, self.heads, self.time
        shape = (batch_size, time, k)
        queries = BLOCK_QUERIES if self.causal else time
        self.group = min(batch_size, max(1, SCORE_ELEMENTS // (heads * queries * time)))
        self.blocks = [
            Block(
                first,
                last,
                np.empty((batch_size, heads, last - first, last), dtype),
                np.empty((self.group, heads, last - first, last), dtype),
            )
            for first, last in ((start, min(start + queries, time)) for start in range(0, time, queries))
        ]
        self.projected = np.empty((batch_size, time, 3 * k), dtype)
        self.d_projected = np.empty_like(self.projected)
        self.gathered, self.y, self.dx = (np.empty(shape, dtype) for _ in range(3))
        self.sums = np.empty((batch_size, heads, time, 1), dtype)
        self.row = np.empty((self.group, heads, time, 1), dtype)
        self.share = np.empty((self.group, heads, time, self.width), dtype)
        self.part = np.empty_like(self.share)
        self.ones = np.ones(batch_size * time, dtype)
        self.along_time = np.ones(time, dtype)
        # Added to the scores of a block's queries among themselves: minus infinity above the diagonal.
        self.hidden = np.triu(np.full((queries, queries), -np.inf, dtype), 1) if self.causal else None
        # 1/sqrt(d) for the columns of Q: in the weights it costs less than in Q, and less there than in the scores.
        self.column_scale = np.ones(3 * k, dtype)
        self.column_scale[:k] = self.scale
        self.scaled_weight = np.empty((k, 3 * k), dtype)

    def forward(self, x: FloatArray) -> FloatArray:
        """x (n, time, features) -> the same shape. With E = e^S, softmax(S) V is E V, its rows divided by E's sums."""
        n = len(x)
        self.x = x.reshape(-1, self.features)
        projected, gathered, y = self.projected[:n], self.gathered[:n], self.y[:n]
        rows = projected.reshape(-1, 3 * self.features)
        np.multiply(self.in_weight, self.column_scale, out=self.scaled_weight)
        np.matmul(self.x, self.scaled_weight, out=rows)
        np.add(rows, self.in_bias * self.column_scale, out=rows)
        for samples in self._groups(n):
            q, k, v = self._by_head(projected[samples], 3)
            (g,) = self._by_head(gathered[samples], 1)
            sums = self.sums[samples]
            for block in self.blocks:
                exponentials = block.exponentials[samples]
                own = slice(block.first, block.last)
                np.matmul(q[:, :, own], k[:, :, : block.last].swapaxes(2, 3), out=exponentials)
                self._exponentiate(exponentials, block.first)
                np.matmul(exponentials, self.along_time[: block.last], out=sums[:, :, own, 0])
                np.matmul(exponentials, v[:, :, : block.last], out=g[:, :, own])
            np.divide(g, sums, out=g)
        outputs = y.reshape(-1, self.features)
        np.matmul(gathered.reshape(-1, self.features), self.out_weight, out=outputs)
        np.add(outputs, self.out_bias, out=outputs)
        return y

    def _exponentiate(self, scores: FloatArray, first: int) -> None:
        """e^S in place, for queries from `first` on; the row's maximum is subtracted where scores are not small.

        Numerator and denominator of the softmax shrink alike, and no e^S overflows. NumPy's maximum along a row and
        its subtraction take longer than all else here, the smallest and largest of all scores hardly any time.
        """
        small = scores.min() > -SMALL_SCORE and scores.max() < SMALL_SCORE
        if self.hidden is not None:
            among = scores[..., first:]
            queries = among.shape[2]
            np.add(among, self.hidden[:queries, :queries], out=among)
        if not small:
            row = self.row[: len(scores), :, : scores.shape[2]]
            np.max(scores, axis=3, keepdims=True, out=row)
            np.subtract(scores, row, out=scores)
        np.exp(scores, out=scores)

    def backward_parameters(self, dy: FloatArray) -> None:
        """Back through the projection out, each head, and into the weights of the projection in.

        With A = softmax(S), S = Q K^T / sqrt(d) and G = A V for a head:
            dV = A^T dG        dA = dG V^T
            dS_ts = A_ts (dA_ts - sum_u A_tu dA_tu), the softmax's Jacobian, where
            sum_u A_tu dA_tu = sum_j dG_tj sum_u A_tu V_uj = sum_j dG_tj G_tj: d products in place of `time`
            dQ = dS K / sqrt(d)        dK = dS^T Q / sqrt(d)
        A_ts is E_ts / r_t with r the row sums of E, and A is not needed: with H_t = dG_t / r_t, d values in place of
        `time`, dV = E^T H and dS_ts = E_ts (sum_j H_tj V_sj - sum_j H_tj G_tj).
        The projections are linear layers: dW = X^T dY, db = the column sums, dX = dY W^T. Q / sqrt(d) is what the
        projection in made, with W and b times the column's scale c: so dW and db are c times what X^T dY and the
        column sums are. The keys' bias b adds Q_t b to all scores of query t alike, which softmax does not see: its
        gradient is 0, and what rounding leaves in its place would become full steps of Adam's.
        """
        n = len(dy)
        d_outputs = dy.reshape(-1, self.features)
        gathered, d_projected = self.gathered[:n], self.d_projected[:n]
        ones = self.ones[: len(d_outputs)]
        np.matmul(gathered.reshape(-1, self.features).T, d_outputs, out=self.d_out_weight)
        np.dot(ones, d_outputs, out=self.d_out_bias)
        d_gathered = self.dx[:n]  # its place is free until backward_input
        np.matmul(d_outputs, self.out_weight.T, out=d_gathered.reshape(-1, self.features))
        for samples in self._groups(n):
            (g,), (dg,) = self._by_head(gathered[samples], 1), self._by_head(d_gathered[samples], 1)
            h, row = self.share[: len(g)], self.row[: len(g)]
            np.divide(dg, self.sums[samples], out=h)
            np.einsum("nhtj,nhtj->nht", h, g, out=row[..., 0])
            self._backward_scores(samples, h, row)
        d_rows = d_projected.reshape(-1, 3 * self.features)
        np.matmul(self.x.T, d_rows, out=self.d_in_weight)
        np.multiply(self.d_in_weight, self.column_scale, out=self.d_in_weight)
        np.dot(ones, d_rows, out=self.d_in_bias)
        np.multiply(self.d_in_bias, self.column_scale, out=self.d_in_bias)
        self.d_in_bias[self.features : 2 * self.features] = 0

    def _backward_scores(self, samples: slice, h: FloatArray, row: FloatArray) -> None:
        """dQ, dK and dV of some samples, given H and the sums over j of H_tj G_tj."""
        q, k, v = self._by_head(self.projected[samples], 3)
        dq, dk, dv = self._by_head(self.d_projected[samples], 3)
        for block in reversed(self.blocks):  # the last sees every key: it writes, the others add
            own, keys = slice(block.first, block.last), slice(block.last)
            exponentials, d_scores = block.exponentials[samples], block.scores[: len(h)]
            np.matmul(h[:, :, own], v[:, :, keys].swapaxes(2, 3), out=d_scores)
            np.subtract(d_scores, row[:, :, own], out=d_scores)
            np.multiply(d_scores, exponentials, out=d_scores)
            np.matmul(d_scores, k[:, :, keys], out=dq[:, :, own])
            for left, right, total in ((exponentials, h, dv), (d_scores, q, dk)):
                part = total if block is self.blocks[-1] else self.part[: len(h), :, keys]
                np.matmul(left.swapaxes(2, 3), right[:, :, own], out=part)
                if part is not total:
                    np.add(total[:, :, keys], part, out=total[:, :, keys])

    def backward_input(self, dy: FloatArray) -> FloatArray:
        """dX = dZ W^T with dZ the gradient of Q / sqrt(d), K and V, which backward_parameters has left."""
        dx = self.dx[: len(dy)]
        d_rows = self.d_projected[: len(dy)].reshape(-1, 3 * self.features)
        np.matmul(d_rows, self.scaled_weight.T, out=dx.reshape(-1, self.features))
        return dx

    def _groups(self, samples: int) -> Iterator[slice]:
        return (slice(start, min(start + self.group, samples)) for start in range(0, samples, self.group))

    def _by_head(self, samples: FloatArray, parts: int) -> FloatArray:
        """(n, time, parts x features) seen as (parts, n, heads, time, d), nothing copied."""
        return samples.reshape(-1, self.time, parts, self.heads, self.width).transpose(2, 0, 3, 1, 4)
