"""Convolution with kernels of 3 x 3 and stride 1 in 16 products for every 4 outputs instead of 36: F(2 x 2, 3 x 3).

In one direction, two neighbouring outputs y_0 = d_0 g_0 + d_1 g_1 + d_2 g_2 and y_1 = d_1 g_0 + d_2 g_1 + d_3 g_2 are

    y_0 = m_0 + m_1 + m_2    m_0 = (d_0 - d_2) g_0    m_1 = (d_1 + d_2) (g_0 + g_1 + g_2) / 2
    y_1 = m_1 - m_2 - m_3    m_3 = (d_1 - d_3) g_2    m_2 = (d_2 - d_1) (g_0 - g_1 + g_2) / 2

and in two directions the same is done to rows and then to columns. (Lavin & Gray 2016, "Fast algorithms for
convolutional neural networks".) Summed over channels each of the 16 products is one matrix product, (tiles, channels)
by (channels, filters).

Rules: factors are 1, 1/2 and 1/4, so that float32 errs by no more than twice what the plain sum does. Slices of tiles
stay in cache; buffers are made once.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from worker.engine.layers.tiles import quarters
from worker.engine.layers.window import Windows
from worker.engine.params import FloatArray, Shape

# What one slice's products read and write, a little more than an L2 of today: half of it pays for more calls.
SLICE_BYTES: Final = 2 * 1024 * 1024
# What the products of a whole batch read, four times its images, is kept from forward to backward up to so much: making
# it anew takes a tenth of the layer's step.
KEPT_BYTES: Final = 16 * 1024 * 1024
# With fewer channels or filters the additions cost more than the products they save: on 14 x 14 a step of 16 to 16 took
# 2.3 ms instead of 1.8, of 32 to 32 it took 4.5 instead of 4.7.
LEAST_CHANNELS: Final = 32
LEAST_PIXELS: Final = 6  # a side; on 5 x 5 nearly a third of the tiles' area lies outside

# From the kernel's three values to the four factors of m_0 to m_3; for both directions (16, 9).
FACTORS: Final = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
FACTORS_BOTH: Final = np.kron(FACTORS, FACTORS)


def pays(windows: Windows, filters: int) -> bool:
    """Whether a convolution can be done this way and is faster for it."""
    down, across, channels = windows
    fits = all((axis.window, axis.stride) == (3, 1) and axis.outputs >= LEAST_PIXELS for axis in (down, across))
    return fits and min(channels, filters) >= LEAST_CHANNELS


def factors(weight: FloatArray, out: FloatArray) -> FloatArray:
    """A weight (3, 3, channels, filters) as factors of the 16 products, out (16, channels, filters)."""
    np.matmul(FACTORS_BOTH.astype(out.dtype), weight.reshape(9, -1), out=out.reshape(16, -1))
    return out


class Winograd:
    """y_pqf = b_f + sum over i, j, c of x_(p + i - before)(q + j - before)c g_ijcf, in buffers of its own.

    Attributes:
        tiled: y and dy lie as tiles of 2 x 2 (tiles.py).
    """

    tiled = False

    def __init__(
        self, input_shape: Shape, output_shape: Shape, before: tuple[int, int], batch_size: int, dtype: npt.DTypeLike
    ) -> None:
        """Shapes are (height, width, channels); `before` is what is added in front of the image, down and across."""
        self.height, self.width, self.channels = input_shape
        self.before = before
        self.rows, columns, self.filters = output_shape
        self.down, self.across = -(-self.rows // 2), -(-columns // 2)  # tiles
        itemsize = np.dtype(dtype).itemsize
        row_bytes = 16 * self.across * (self.channels + self.filters) * itemsize
        self.slice_rows = min(max(SLICE_BYTES // row_bytes, 1), self.down)
        self.slice_images = min(max(SLICE_BYTES // (row_bytes * self.down), 1), max(batch_size, 1))
        # Even columns, then odd ones, so that what tiles see at one place lies in long runs. What surrounds the image
        # is written here, once, and stays 0.
        self.padded = np.zeros((self.slice_images, 2 * self.down + 2, 2, self.across + 1, self.channels), dtype)
        self.d_padded = np.empty_like(self.padded)
        tiles = self.slice_images * self.slice_rows * self.across
        self.halfway = np.empty(8 * (tiles + self.slice_images * self.slice_rows) * self.channels, dtype)
        # What the products read: of the whole batch, for `gradients`, where that is not too much.
        slices = -(-batch_size // self.slice_images) * -(-self.down // self.slice_rows)
        most = KEPT_BYTES // (16 * tiles * self.channels * itemsize)
        self.seen = np.empty((max(min(slices, most), 1), 16 * tiles * self.channels), dtype)
        self.d_seen = np.empty(16 * tiles * self.channels, dtype)
        self.part = np.empty(4 * (tiles + self.slice_images * self.slice_rows) * self.channels, dtype)
        self.products = np.empty(16 * tiles * self.filters, dtype)
        self.folded = np.empty(8 * tiles * self.filters, dtype)
        self.ones = np.ones(tiles, dtype)
        self.d_factors = np.empty((2, 16, self.channels, self.filters), dtype)
        self.d_bias_part = np.empty(self.filters, dtype)
        odd = (2 * self.down, 2 * self.across) != (self.rows, columns)
        self.d_whole = np.empty(4 * tiles * self.filters if odd else 0, dtype)

    def convolve(self, x: FloatArray, kernels: FloatArray, bias: Sequence[FloatArray], out: FloatArray) -> None:
        """x (n, *input_shape), kernels (16, channels, filters) from `factors` -> out (n, *output_shape)."""
        kept = self._is_kept(len(x))
        for number, (images, top, stop) in enumerate(self._blocks(len(x))):
            shape = (images.stop - images.start, stop - top, self.across)
            seen = self._see(x, number if kept else 0, images, top, shape)
            products = self.products[: 16 * seen.shape[1] * self.filters].reshape(16, -1, self.filters)
            np.matmul(seen, kernels, out=products)
            for values in bias:  # the product (1, 1) is in all four outputs, once
                np.add(products[5], values, out=products[5])
            self._fold(products.reshape(4, 4, *shape, self.filters), self._quarters(out[images], top, stop))

    def gradients(
        self, x: FloatArray, kernels: FloatArray, dy: FloatArray, d_weight: FloatArray, d_bias: Sequence[FloatArray],
        dx: FloatArray,
    ) -> None:  # fmt: skip
        """dL/dg_ijcf into d_weight (3, 3, channels, filters), dL/db_f into d_bias, dL/dx into dx, after `convolve`.

        The outputs of a tile are sums over the products m with signs, y = A^T m A, and m_k = (B^T d B)_k (G g G^T)_k.
        So dL/dm = A dy A^T, dL/d(G g G^T)_k = sum over tiles of (B^T d B)_k dL/dm_k, 16 matrix products again, and
        dL/dg = G^T (that) G. In the same way dL/d(B^T d B)_k = dL/dm_k (G g G^T)_k, summed over filters, 16 more, and
        dL/dd = B (that) B^T, added up where tiles overlap. dL/dm of product (1, 1) is the sum of its tile's dy, which
        makes it the bias' too.
        """
        kept = self._is_kept(len(x))
        total, part = self.d_factors
        total[...] = 0
        for values in d_bias:
            values[...] = 0
        for number, (images, top, stop) in enumerate(self._blocks(len(x))):
            shape = (images.stop - images.start, stop - top, self.across)
            if kept:
                seen = self._take(self.seen[number], 16, math.prod(shape), self.channels)
            else:
                seen = self._see(x, 0, images, top, shape)
            d_products = self._unfold(self._quarters(dy[images], top, stop), shape)
            np.matmul(seen.transpose(0, 2, 1), d_products, out=part)
            np.add(total, part, out=total)
            for values in d_bias:
                np.dot(self.ones[: seen.shape[1]], d_products[5], out=self.d_bias_part)
                np.add(values, self.d_bias_part, out=values)
            d_seen = self.d_seen[: seen.size].reshape(seen.shape)
            np.matmul(d_products, kernels.transpose(0, 2, 1), out=d_seen)
            self._scatter(d_seen.reshape(4, 4, *shape, self.channels), top)
            if stop == self.down:
                for source, target in self._places(self.d_padded, dx[images]):
                    np.copyto(target, source)
        np.matmul(FACTORS_BOTH.T.astype(total.dtype), total.reshape(16, -1), out=d_weight.reshape(9, -1))

    def _blocks(self, samples: int) -> Iterator[tuple[slice, int, int]]:
        """Images, and the first and last row of tiles; several images only where whole images fit."""
        for first in range(0, samples, self.slice_images):
            for top in range(0, self.down, self.slice_rows):
                images = slice(first, min(first + self.slice_images, samples))
                yield images, top, min(top + self.slice_rows, self.down)

    def _is_kept(self, samples: int) -> bool:
        """Whether what the products of so many samples read is there until `gradients`."""
        return -(-samples // self.slice_images) * -(-self.down // self.slice_rows) <= len(self.seen)

    def _see(self, x: FloatArray, number: int, images: slice, top: int, shape: Shape) -> FloatArray:
        """What the 16 products read, (16, tiles, channels): the differences and sums of d in both directions."""
        count, rows, columns = shape
        if top == 0:
            for target, source in self._places(self.padded, x[images]):
                np.copyto(target, source)
        padded = self.padded[:count, 2 * top : 2 * (top + rows) + 2]
        halfway = self._take(self.halfway, 4, count, rows, *padded.shape[2:])
        seen = self._take(self.seen[number], 4, 4, *shape, self.channels)
        _differences([padded[:, k : k + 2 * rows : 2] for k in range(4)], halfway)
        _differences(
            [halfway[:, :, :, k % 2, k // 2 : k // 2 + columns] for k in range(4)], seen.swapaxes(0, 1)
        )  # fmt: skip
        return seen.reshape(16, -1, self.channels)

    def _scatter(self, d_seen: FloatArray, top: int) -> None:
        """Add dL/d(B^T d B) (4, 4, n, rows, columns, channels), which is written over, to dL/dd in `d_padded`."""
        _, _, count, rows, columns, channels = d_seen.shape
        halfway = self._take(self.halfway, 4, count, rows, 2, columns + 1, channels)
        part = self._take(self.part, 4, count, rows, columns, channels)
        halfway[:, :, :, :, 0] = 0
        _add_differences(d_seen.swapaxes(0, 1), halfway[:, :, :, 0], halfway[:, :, :, 1], part, axis=3)
        d_padded = self.d_padded[:count, 2 * top : 2 * (top + rows) + 2]
        if top == 0:
            d_padded[:, :2] = 0
        part = self._take(self.part, count, rows, 2, columns + 1, channels)
        _add_differences(halfway, d_padded[:, 0::2], d_padded[:, 1::2], part, axis=1)

    def _places(self, padded: FloatArray, images: FloatArray) -> Iterator[tuple[FloatArray, FloatArray]]:
        """Where in `padded` every second column of the images lies, and these columns."""
        down, across = self.before
        inside = padded[: len(images), down : down + self.height]
        for j in (0, 1):
            first, columns = across + j, -(-(self.width - j) // 2)
            yield inside[:, :, first % 2, first // 2 : first // 2 + columns], images[:, :, j::2]

    @staticmethod
    def _take(buffer: FloatArray, *shape: int) -> FloatArray:
        """The beginning of a buffer as an array of this shape."""
        return buffer[: math.prod(shape)].reshape(shape)

    def _quarters(self, maps: FloatArray, top: int, stop: int) -> list[list[FloatArray]]:
        """The four outputs of the tiles in rows `top` to `stop`; at an odd edge some tiles have fewer."""
        return [[quarter[:, top:stop] for quarter in pair] for pair in quarters(maps, self.tiled)]

    def _fold(self, products: FloatArray, out: list[list[FloatArray]]) -> None:
        """The outputs from the products (4, 4, n, rows, columns, filters): first over rows, then over columns."""
        folded = self.folded[: products.size // 2].reshape(2, *products.shape[1:])
        np.add(products[0], products[1], out=folded[0])
        np.add(folded[0], products[2], out=folded[0])
        np.subtract(products[1], products[2], out=folded[1])
        np.subtract(folded[1], products[3], out=folded[1])
        for (m_0, m_1, m_2, m_3), (even, odd) in zip(folded, out, strict=True):
            np.add(m_0, m_1, out=m_0)
            np.subtract(m_1, m_2, out=m_1)
            for first, second, operation, target in ((m_0, m_2, np.add, even), (m_1, m_3, np.subtract, odd)):
                rows, columns = target.shape[1:3]  # an odd row or column more than there are outputs is left out
                operation(first[:, :rows, :columns], second[:, :rows, :columns], out=target)

    def _unfold(self, dy: list[list[FloatArray]], shape: Shape) -> FloatArray:
        """dL/dm (16, tiles, filters): first over rows, then over columns; beyond the outputs dy is 0."""
        size = math.prod(shape) * self.filters
        products = self.products[: 16 * size].reshape(4, 4, *shape, self.filters)
        if dy[1][1].shape[1:3] != shape[1:]:
            dy = self._whole(dy, self.d_whole[: 4 * size].reshape(2, 2, *shape, self.filters))
        folded = self.folded[: 8 * size].reshape(4, 2, *shape, self.filters)
        for j in (0, 1):
            _spread(dy[0][j], dy[1][j], folded[:, j])
        _spread(folded[:, 0], folded[:, 1], products.swapaxes(0, 1))
        return products.reshape(16, -1, self.filters)

    def _whole(self, dy: list[list[FloatArray]], whole: FloatArray) -> list[list[FloatArray]]:
        """The quarters of an image of odd size as if it went on with zeros."""
        whole[...] = 0
        for pair, target_pair in zip(dy, whole, strict=True):
            for quarter, target in zip(pair, target_pair, strict=True):
                target[:, : quarter.shape[1], : quarter.shape[2]] = quarter
        return [list(pair) for pair in whole]


def _spread(first: FloatArray, second: FloatArray, out: FloatArray) -> None:
    """dL/dm_0 to dL/dm_3 of y_0 = m_0 + m_1 + m_2 and y_1 = m_1 - m_2 - m_3."""
    np.copyto(out[0], first)
    np.add(first, second, out=out[1])
    np.subtract(first, second, out=out[2])
    np.negative(second, out=out[3])


def _differences(d: Sequence[FloatArray], out: FloatArray) -> None:
    """d_0 - d_2, d_1 + d_2, d_2 - d_1 and d_1 - d_3 into out[0] to out[3]."""
    np.subtract(d[0], d[2], out=out[0])
    np.add(d[1], d[2], out=out[1])
    np.subtract(d[2], d[1], out=out[2])
    np.subtract(d[1], d[3], out=out[3])


def _add_differences(m: FloatArray, even: FloatArray, odd: FloatArray, part: FloatArray, axis: int) -> None:
    """dL/dd of what `_differences` made: of tile t, d_0 and d_2 are even[t] and even[t + 1], d_1 and d_3 are odd's.

    Along `axis` of even and odd, which have one more than m has tiles. Their first is added to and the others are
    written anew; m[1] is written over.
    """
    behind = (*(slice(None),) * axis, slice(1, None))
    here = (*(slice(None),) * axis, slice(None, -1))
    np.add(m[1], m[2], out=part)
    np.subtract(part, m[0], out=even[behind])
    np.add(even[here], m[0], out=even[here])
    np.negative(m[3], out=odd[behind])
    np.subtract(m[1], m[2], out=m[1])
    np.add(m[1], m[3], out=m[1])
    np.add(odd[here], m[1], out=odd[here])
