"""Batch normalization: each channel brought to mean 0 and variance 1 over the batch.

Rules: a channel is a place on the last axis of (features,), (time, features) or (height, width, channels); it is
normalized over all positions of all samples. Training uses the batch's own statistics and leaves their sums for the
running ones, which evaluation uses. Sums that leave the layer are float64 and taken about the running mean, which
every rank knows: they add up, and nothing cancels out once that mean is near the data's. The batch is worked through
a block at a time, which all passes find in cache.
"""

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar, Final

import numpy as np
import numpy.typing as npt

from protos import job_pb2
from worker.engine.layers.layer import Moment, Reduce, Sums, Takes, Traits
from worker.engine.params import FloatArray, Parameter, Shape
from worker.errors import ModelFault

BLOCK_ELEMENTS: Final = 1 << 16  # 256 KB of float32
# A row of a block holds positions side by side up to this width: NumPy's inner loops are then long for few channels.
ROW_ELEMENTS: Final = 2048


class BatchNorm:
    """y_ic = w_c xhat_ic + b_c, xhat_ic = (x_ic - mean_c) / sqrt(var_c + epsilon), i: all positions of all samples.

    In training mean and variance are those of the samples this rank computes at once, or of the whole batch where
    `synchronized`. A lone value has variance 0: its output is b and its gradient 0. (Ioffe and Szegedy 2015.)
    """

    traits: ClassVar[Traits] = Traits(Takes.ANYTHING, channel_bias="bias", passes_scale=True)
    reads_output: ClassVar[bool] = False
    works_in_place: ClassVar[bool] = False

    def __init__(self, options: job_pb2.BatchNormLayer, input_shape: Shape) -> None:
        """ModelFault when there is nothing to normalize, or the job is unresolved."""
        for name in ("momentum", "epsilon", "synchronized"):
            if not options.HasField(name):
                raise ModelFault(f"{name}: is absent, a resolved job has it")
        if math.prod(input_shape) < 1 or not input_shape:
            raise ModelFault(f"got samples of shape {input_shape}, which hold no values; needs at least one")
        self.momentum, self.epsilon = options.momentum, options.epsilon
        self.output_shape: Shape = input_shape
        self.channels = channels = input_shape[-1]
        positions = math.prod(input_shape[:-1])
        most = max(1, ROW_ELEMENTS // channels)
        self.positions_per_row = max(k for k in range(1, min(most, positions) + 1) if positions % k == 0)
        self.row = self.positions_per_row * channels
        self.block = max(1, BLOCK_ELEMENTS // self.row)
        self.parameters: tuple[Parameter, ...] = (
            Parameter("weight", (channels,), fan_in=0, fan_out=0, initial=1.0),
            Parameter("bias", (channels,), fan_in=0, fan_out=0),
        )
        self.state: tuple[Parameter, ...] = (
            Parameter("running_mean", (channels,), fan_in=0, fan_out=0),
            Parameter("running_variance", (channels,), fan_in=0, fan_out=0, initial=1.0),
        )
        self.synchronized = options.synchronized
        self.sum_count = 0 if self.synchronized else 1 + 2 * channels
        self.lone = positions == 1
        self.training = False

    def attach(self, values: Sequence[FloatArray], gradients: Sequence[FloatArray]) -> None:
        """Take views: weight (channels,), bias (channels,), and the gradients alike."""
        self.weight, self.bias = values
        if gradients:
            self.d_weight, self.d_bias = gradients

    def check_batch(self, at_once: int, batch: int) -> None:
        """ModelFault where each value of a channel would be alone, and so normalized to 0, in every step."""
        if self.lone and (batch if self.synchronized else at_once) < 2:
            where = "a batch has" if self.synchronized else "a worker computes"
            raise ModelFault(
                f"{where} 1 sample at a time, and one value a channel has no variance: nothing would be learned; "
                "needs at least 2, by a larger training.batch_size"
                + ("" if self.synchronized or batch < 2 else ", fewer workers or synchronized: true")
            )

    def attach_state(self, values: Sequence[FloatArray], sums: Sums, reduce: Reduce) -> None:
        """Take views: running_mean (channels,), running_variance (channels,) and, unless synchronized, the sums."""
        self.running_mean, self.running_variance = values
        self.reduce = reduce
        # Those of all ranks: by the reduction after the step or, where synchronized, by the one within `forward`.
        self.sums = np.zeros(1 + 2 * self.channels) if self.synchronized else sums

    def reserve(self, batch_size: int, dtype: npt.DTypeLike, in_place: bool) -> None:
        """The output, one block of scratch, and what every position of a row is multiplied with or shifted by."""
        self.y = np.empty((batch_size, *self.output_shape), dtype)
        rows = min(self.block, self.y.size // self.row)
        self.scratch = np.empty((rows, self.row), dtype)
        self.ones = np.ones(rows, dtype)
        self.factor, self.term, self.factor_of_x = (np.empty(self.row, dtype) for _ in range(3))
        self.row_sum = np.empty(self.row, dtype)
        self.row_sums = np.empty((2, self.row))

    def begin(self, moment: Moment | None) -> None:
        """Training, or evaluation (None)."""
        self.training = moment is not None

    def forward(self, x: FloatArray) -> FloatArray:
        """y = x f + t with f = w / sqrt(var + epsilon), t = b - mean f: two passes over each block."""
        self.x = x
        y = self.y[: len(x)]
        if self.training:
            self._take_statistics(x)
        else:
            # As if over so many values that one more counts for nothing: their gradient is that of constants.
            self.count, self.mean = math.inf, self.running_mean.astype(np.float64)
            self.inverse = 1 / np.sqrt(self.running_variance + self.epsilon, dtype=np.float64)
        factor = self.weight * self.inverse
        self._spread(factor, self.factor)
        self._spread(self.bias - self.mean * factor, self.term)
        rows, y_rows = x.reshape(-1, self.row), y.reshape(-1, self.row)
        for block in self._blocks(len(rows)):
            np.multiply(rows[block], self.factor, out=y_rows[block])
            np.add(y_rows[block], self.term, out=y_rows[block])
        return y

    def backward_parameters(self, dy: FloatArray) -> None:
        """dL/dw_c = sum over i of dy_ic xhat_ic, dL/db_c = sum over i of dy_ic, over this rank's samples."""
        rows, x_rows = dy.reshape(-1, self.row), self.x.reshape(-1, self.row)
        self._spread(self.mean, self.term)
        self.row_sums[...] = 0
        for block in self._blocks(len(rows)):
            centred = self.scratch[: len(rows[block])]
            np.subtract(x_rows[block], self.term, out=centred)
            np.multiply(centred, rows[block], out=centred)
            self._add_up(rows[block], 0)
            self._add_up(centred, 1)
        self.d_sums = self._by_channel()  # of dy, and of dy (x - mean)
        self.d_sums[1] *= self.inverse
        self.d_bias[...], self.d_weight[...] = self.d_sums

    def backward_input(self, dy: FloatArray) -> FloatArray:
        """dx_i = w r (dy_i - mean(dy) - xhat_i mean(dy xhat)), for each channel, with r = 1/sqrt(var + epsilon).

        x_i moves the mean m by 1/N and the variance by (2/N)(x_i - m), as the mean of x - m is 0. So, of xhat_j =
        (x_j - m) r with dr/dvar = -r^3/2: dxhat_j/dx_i = r ([i = j] - 1/N) - r xhat_j xhat_i / N. The sum over j of
        w dy_j times this is the line above; the means are over all N values that had part in m and var, on whatever
        rank, and N is infinite where m and var were given. It is computed as dy f + x g + t.
        """
        sums = self.d_sums
        if self.synchronized and self.training:
            self.reduce(sums.reshape(-1))
        mean_dy, mean_projected = sums / self.count
        factor = self.weight * self.inverse
        factor_of_x = -factor * self.inverse * mean_projected
        self._spread(factor, self.factor)
        self._spread(factor_of_x, self.factor_of_x)
        self._spread(-factor * mean_dy - factor_of_x * self.mean, self.term)
        rows, x_rows = dy.reshape(-1, self.row), self.x.reshape(-1, self.row)
        for block in self._blocks(len(rows)):
            of_x = self.scratch[: len(rows[block])]
            np.multiply(rows[block], self.factor, out=rows[block])
            np.multiply(x_rows[block], self.factor_of_x, out=of_x)
            np.add(of_x, self.term, out=of_x)
            np.add(rows[block], of_x, out=rows[block])
        return dy

    def update_state(self) -> None:
        """running <- (1 - momentum) running + momentum (mean, variance N/(N - 1)) of all the batch's N values.

        The variance is the unbiased estimate, as in PyTorch; a lone value has none and changes nothing.
        """
        count, mean, variance = self._statistics(self.sums)
        self.sums[...] = 0
        if count < 2:
            return
        for running, now in ((self.running_mean, mean), (self.running_variance, variance * (count / (count - 1)))):
            running[...] = (1 - self.momentum) * running.astype(np.float64) + self.momentum * now

    def _take_statistics(self, x: FloatArray) -> None:
        """Count, mean and 1/sqrt(var + epsilon) of the batch, and the sums they come from into `sums`."""
        sums = self._sums(x)
        if self.synchronized:
            self.reduce(sums)
            self.sums[...] = sums
        else:
            self.sums += sums
        self.count, self.mean, variance = self._statistics(sums)
        self.inverse = 1 / np.sqrt(variance + self.epsilon)

    def _sums(self, x: FloatArray) -> Sums:
        """N and, for each channel, the sums of x - running mean and of its square: float64 (1 + 2 channels,).

        Squares are taken about the first block's mean, which is near the batch's, so that float32 is enough.
        """
        rows = x.reshape(-1, self.row)
        about = np.zeros(self.channels)
        self.row_sums[...] = 0
        for block in self._blocks(len(rows)):
            if block.start == 0:
                self._add_up(rows[block], 0)
                about = self._by_channel()[0] / (len(rows[block]) * self.positions_per_row)
                self._spread(about, self.term)
                self.row_sums[...] = 0
            centred = self.scratch[: len(rows[block])]
            np.subtract(rows[block], self.term, out=centred)
            self._add_up(centred, 0)
            np.multiply(centred, centred, out=centred)
            self._add_up(centred, 1)
        count = x.size // self.channels
        first, second = self._by_channel()
        # With d = about - running mean: x - running mean = (x - about) + d.
        difference = self.term[: self.channels].astype(np.float64) - self.running_mean if count else about
        second += difference * (2 * first + count * difference)
        first += count * difference
        sums = np.concatenate(([count], first, second))
        # An infinite variance would pass for a channel that is always at its mean: let the loss show it.
        sums[~np.isfinite(sums)] = np.nan
        return sums

    def _statistics(self, sums: Sums) -> tuple[float, npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """N, mean and variance; a variance that rounding makes negative is 0."""
        count = float(sums[0])
        first, second = sums[1:].reshape(2, self.channels) / max(count, 1.0)
        return count, self.running_mean + first, np.maximum(second - first * first, 0)

    def _add_up(self, block: FloatArray, which: int) -> None:
        """Add a block's column sums: a product with ones, which BLAS does in half the time of a reduction."""
        np.dot(self.ones[: len(block)], block, out=self.row_sum)
        np.add(self.row_sums[which], self.row_sum, out=self.row_sums[which])

    def _by_channel(self) -> npt.NDArray[np.float64]:
        """Both sums for each channel: (2, channels)."""
        sums: npt.NDArray[np.float64] = self.row_sums.reshape(2, self.positions_per_row, self.channels).sum(axis=1)
        return sums

    def _spread(self, values: npt.NDArray[np.float64], row: FloatArray) -> None:
        """Write the channels' values at each position of a row."""
        row.reshape(self.positions_per_row, self.channels)[...] = values

    def _blocks(self, rows: int) -> Iterator[slice]:
        return (slice(start, min(start + self.block, rows)) for start in range(0, rows, self.block))
