"""Convolution with kernels of 3 x 3 and stride 1 in 16 products for every 4 outputs instead of 36: F(2 x 2, 3 x 3).

In one direction, two neighbouring outputs y_0 = d_0 g_0 + d_1 g_1 + d_2 g_2 and y_1 = d_1 g_0 + d_2 g_1 + d_3 g_2 are

    y_0 = m_0 + m_1 + m_2    m_0 = (d_0 - d_2) g_0    m_1 = (d_1 + d_2) (g_0 + g_1 + g_2) / 2
    y_1 = m_1 - m_2 + m_3    m_3 = (d_3 - d_1) g_2    m_2 = (d_2 - d_1) (g_0 - g_1 + g_2) / 2

and in two directions the same is done to rows and then to columns. (Lavin & Gray 2016, "Fast algorithms for
convolutional neural networks".) Summed over channels each of the 16 products is one matrix product, (tiles, channels)
by (channels, filters).

Rules: factors are 1, 1/2 and 1/4, so that float32 errs by no more than twice what the plain sum does. Slices of tiles
stay in cache; buffers are made once. In them rows and columns are the outer axes and the images of a slice lie inside:
one row or column further is then the same long run, shifted.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import numpy as np
import numpy.typing as npt

from worker.engine.layers.tiles import TakesTiles
from worker.engine.layers.window import Windows
from worker.engine.params import FloatArray, Shape

# What one slice's products read and write. Of 14 x 14 images, 32 channels to 64 filters, these are 8: with 6 a step of
# the CNN of examples/ took 3 % longer, with 10 or 12 an eighth.
SLICE_BYTES: Final = 2500 * 1024
# What the products of a whole batch read, four times its images, is kept from forward to backward up to so much: making
# it anew takes a tenth of the layer's step.
KEPT_BYTES: Final = 16 * 1024 * 1024
# With fewer channels or filters the additions cost more than the products they save: on 14 x 14 a step of 16 to 16 took
# 2.3 ms instead of 1.8, of 32 to 32 it took 4.5 instead of 4.7.
LEAST_CHANNELS: Final = 32
# NumPy copies operands that lie in several pieces into buffers of its own, by 8192 elements, before it adds them up,
# unless a piece fills a buffer. With buffers smaller than a piece, one image's row of tiles, it adds where they lie:
# of 1344 elements 6 a nanosecond instead of 3.
BUFFER_ELEMENTS: Final = 256
LEAST_PIXELS: Final = 6  # a side; on 5 x 5 nearly a third of the tiles' area lies outside

# From the kernel's three values to the four factors of m_0 to m_3; for both directions (16, 9).
FACTORS: Final = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
FACTORS_BOTH: Final = np.kron(FACTORS, FACTORS)


def pays(windows: Windows, filters: int) -> bool:
    """Whether a convolution can be done this way and is faster for it."""
    down, across, channels = windows
    fits = all((axis.window, axis.stride) == (3, 1) and axis.outputs >= LEAST_PIXELS for axis in (down, across))
    return fits and min(channels, filters) >= LEAST_CHANNELS


def image_bytes(output_shape: Shape, channels: int, itemsize: int) -> int:
    """What the products of one image read and write."""
    rows, columns, filters = output_shape
    return 16 * -(-rows // 2) * -(-columns // 2) * (channels + filters) * itemsize


def factors(weight: FloatArray, out: FloatArray) -> FloatArray:
    """A weight (3, 3, channels, filters) as factors of the 16 products, out (16, channels, filters)."""
    np.matmul(FACTORS_BOTH.astype(out.dtype), weight.reshape(9, -1), out=out.reshape(16, -1))
    return out


class Winograd:
    """y_pqf = b_f + sum over i, j, c of x_(p + i - before)(q + j - before)c g_ijcf, in buffers of its own."""

    def __init__(
        self, input_shape: Shape, output_shape: Shape, before: tuple[int, int], batch_size: int, dtype: npt.DTypeLike,
        pooling: TakesTiles | None,
    ) -> None:  # fmt: skip
        """Shapes are (height, width, channels); `before` is what is added in front of the image, down and across.

        `pooling` is given each slice's y as tiles of 2 x 2, whole images, and gives their gradient (tiles.py).
        """
        self.height, self.width, self.channels = input_shape
        self.before, self.pooling = before, pooling
        self.rows, self.columns, self.filters = output_shape
        self.down, self.across = -(-self.rows // 2), -(-self.columns // 2)  # tiles
        itemsize = np.dtype(dtype).itemsize
        whole = image_bytes(output_shape, self.channels, itemsize)
        self.slice_rows = self.down if pooling else min(max(SLICE_BYTES * self.down // whole, 1), self.down)
        self.slice_images = min(max(SLICE_BYTES // whole, 1), max(batch_size, 1))
        # Even rows, then odd ones, and so the columns: what tiles see at one place lies in long runs. What surrounds
        # the image is written here, once, and stays 0.
        padded = (2, self.down + 1, 2, self.across + 1, self.slice_images, self.channels)
        self.padded = np.zeros(padded, dtype)
        self.d_padded = np.empty(math.prod(padded), dtype)
        tiles = self.slice_images * self.slice_rows * self.across
        self.halfway = np.empty(8 * (tiles + self.slice_images * self.slice_rows) * self.channels, dtype)
        # What the products read: of the whole batch, for `gradients`, where that is not too much.
        slices = -(-batch_size // self.slice_images) * -(-self.down // self.slice_rows)
        most = KEPT_BYTES // (16 * tiles * self.channels * itemsize)
        self.seen = np.empty((max(min(slices, most), 1), 16 * tiles * self.channels), dtype)
        self.d_seen = np.empty(16 * tiles * self.channels, dtype)
        self.part = np.empty(4 * (tiles + self.slice_images * self.slice_rows) * self.channels, dtype)
        self.products = np.empty(16 * tiles * self.filters, dtype)
        self.ones = np.ones(tiles, dtype)
        self.turned = np.empty((16, self.filters, self.channels), dtype)
        self.d_factors = np.empty((2, 16, self.channels, self.filters), dtype)
        self.d_bias_part = np.empty(self.filters, dtype)

    def convolve(self, x: FloatArray, kernels: FloatArray, bias: Sequence[FloatArray], out: FloatArray) -> None:
        """x (n, *input_shape), kernels (16, channels, filters) from `factors` -> out (n, *output_shape).

        A pooling is given y instead, and nothing is written to `out`.
        """
        kept = self._is_kept(len(x))
        for number, (images, top, stop) in enumerate(self._blocks(len(x))):
            shape = (stop - top, self.across, images.stop - images.start)
            seen = self._see(x, number if kept else 0, images, top, shape)
            products = self._take(self.products, 4, 4, *shape, self.filters)
            np.matmul(seen, kernels, out=products.reshape(16, -1, self.filters))
            for values in bias:  # the product (1, 1) is in all four outputs, once
                np.add(products[1, 1], values, out=products[1, 1])
            y = _fold(products)
            if self.pooling:
                self.pooling.pool(images, _by_image(y))
                continue
            for quarter, target in self._quarters(y, out[images], top):
                np.copyto(target, quarter)

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
        np.copyto(self.turned, kernels.transpose(0, 2, 1))  # a transposed factor makes a product a fifth slower
        for number, (images, top, stop) in enumerate(self._blocks(len(x))):
            shape = (stop - top, self.across, images.stop - images.start)
            if kept:
                seen = self._take(self.seen[number], 16, math.prod(shape), self.channels)
            else:
                seen = self._see(x, 0, images, top, shape)
            d_products = self._unfold(dy, images, top, shape)
            np.matmul(seen.transpose(0, 2, 1), d_products, out=part)
            np.add(total, part, out=total)
            for values in d_bias:
                np.dot(self.ones[: seen.shape[1]], d_products[5], out=self.d_bias_part)
                np.add(values, self.d_bias_part, out=values)
            d_seen = self._take(self.d_seen, *seen.shape)
            np.matmul(d_products, self.turned, out=d_seen)
            d_padded = self._scatter(d_seen.reshape(4, 4, *shape, self.channels), top)
            if top + shape[0] == self.down:
                for source, target in self._places(d_padded, dx[images]):
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
        rows, columns, count = shape
        padded = self.padded[..., :count, :]
        if top == 0:
            for target, source in self._places(padded, x[images]):
                np.copyto(target, source)
        halfway = self._take(self.halfway, 4, rows, 2, columns + 1, count, self.channels)
        seen = self._take(self.seen[number], 4, 4, *shape, self.channels)
        with _small_buffers():
            _differences([padded[k % 2, top + k // 2 : top + k // 2 + rows] for k in range(4)], halfway)
            _differences([halfway[:, :, k % 2, k // 2 : k // 2 + columns] for k in range(4)], seen.swapaxes(0, 1))
        return seen.reshape(16, -1, self.channels)

    def _scatter(self, d_seen: FloatArray, top: int) -> FloatArray:
        """Add dL/d(B^T d B) (4, 4, rows, columns, n, channels), which is written over, to dL/dd laid out as `padded`.

        That is begun anew where `top` is 0.
        """
        _, _, rows, columns, count, channels = d_seen.shape
        halfway = self._take(self.halfway, 4, rows, 2, columns + 1, count, channels)
        part = self._take(self.part, 4, rows, columns, count, channels)
        with _small_buffers():
            _add_differences(d_seen.swapaxes(0, 1), halfway[:, :, 0], halfway[:, :, 1], part, axis=2, anew=True)
        d_padded = self._take(self.d_padded, 2, self.down + 1, 2, self.across + 1, count, channels)
        part = self._take(self.part, rows, 2, columns + 1, count, channels)
        even, odd = d_padded[:, top : top + rows + 1]
        with _small_buffers():
            _add_differences(halfway, even, odd, part, axis=0, anew=top == 0)
        return d_padded

    def _places(self, padded: FloatArray, images: FloatArray) -> Iterator[tuple[FloatArray, FloatArray]]:
        """Where in `padded` every second row and column of the images lies, and these: both (rows, columns, n, ...)."""
        for i in (0, 1):
            for j in (0, 1):
                pixels = images[:, i::2, j::2].transpose(1, 2, 0, 3)
                rows, columns = pixels.shape[:2]
                (row, row_parity), (column, column_parity) = (
                    divmod(self.before[0] + i, 2),
                    divmod(self.before[1] + j, 2),
                )
                yield padded[row_parity, row : row + rows, column_parity, column : column + columns], pixels

    @staticmethod
    def _take(buffer: FloatArray, *shape: int) -> FloatArray:
        """The beginning of a buffer as an array of this shape."""
        return buffer[: math.prod(shape)].reshape(shape)

    def _quarters(self, tiles: FloatArray, maps: FloatArray, top: int) -> Iterator[tuple[FloatArray, FloatArray]]:
        """Tiles (2, 2, rows, columns, n, filters) and where each output is in maps (n, *output_shape), part by part.

        At an odd edge some tiles have fewer outputs.
        """
        for i in (0, 1):
            for j in (0, 1):
                target = maps[:, 2 * top + i : 2 * (top + tiles.shape[2]) : 2, j::2].transpose(1, 2, 0, 3)
                yield tiles[i, j, : target.shape[0], : target.shape[1]], target

    def _unfold(self, dy: FloatArray, images: slice, top: int, shape: Shape) -> FloatArray:
        """dL/dm (16, tiles, filters); beyond the outputs dy is 0.

        The four products at the corners are in one output each, whose dy they get as it is.
        """
        products = self._take(self.products, 4, 4, *shape, self.filters)
        corners = products[::3, ::3]
        if self.pooling:
            self.pooling.spread(images, _by_image(corners))
        else:
            if (2 * self.down, 2 * self.across) != (self.rows, self.columns):
                corners[...] = 0
            for quarter, source in self._quarters(corners, dy[images], top):
                np.copyto(quarter, source)
        np.add(products[::3, 0], products[::3, 3], out=products[::3, 1])
        np.subtract(products[::3, 0], products[::3, 3], out=products[::3, 2])
        np.add(products[0], products[3], out=products[1])
        np.subtract(products[0], products[3], out=products[2])
        return products.reshape(16, -1, self.filters)


@contextmanager
def _small_buffers() -> Iterator[None]:
    """NumPy's buffers are of BUFFER_ELEMENTS meanwhile."""
    usual = np.setbufsize(BUFFER_ELEMENTS)
    try:
        yield
    finally:
        np.setbufsize(usual)


def _by_image(tiles: FloatArray) -> FloatArray:
    """Tiles (2, 2, rows, columns, n, filters) seen as (n, 2, 2, rows, columns, filters)."""
    return tiles.transpose(4, 0, 1, 2, 3, 5)


def _fold(products: FloatArray) -> FloatArray:
    """The outputs (2, 2, ...) from the products (4, 4, ...), which are written over: first rows, then columns."""
    for m_0, m_1, m_2, m_3 in (products, products[:2].swapaxes(0, 1)):
        np.add(m_0, m_1, out=m_0)
        np.add(m_0, m_2, out=m_0)
        np.subtract(m_1, m_2, out=m_1)
        np.add(m_1, m_3, out=m_1)
    return products[:2, :2]


def _differences(d: Sequence[FloatArray], out: FloatArray) -> None:
    """d_0 - d_2, d_1 + d_2, d_2 - d_1 and d_3 - d_1 into out[0] to out[3]."""
    np.subtract(d[0], d[2], out=out[0])
    np.add(d[1], d[2], out=out[1])
    np.subtract(d[2], d[1], out=out[2])
    np.subtract(d[3], d[1], out=out[3])


def _add_differences(m: FloatArray, even: FloatArray, odd: FloatArray, part: FloatArray, axis: int, anew: bool) -> None:
    """dL/dd of what `_differences` made: of tile t, d_0 and d_2 are even[t] and even[t + 1], d_1 and d_3 are odd's.

    dL/dd_0 = m_0, dL/dd_1 = m_1 - m_2 - m_3, dL/dd_2 = m_1 + m_2 - m_0 and dL/dd_3 = m_3. Along `axis` even and odd
    have one more than m has tiles. Their first is added to unless they are made `anew`; m[1] is written over.
    """
    first, last, here, behind = (
        (*(slice(None),) * axis, cut) for cut in (slice(0, 1), slice(-1, None), slice(1, None), slice(None, -1))
    )
    inner = (*(slice(None),) * axis, slice(1, -1))
    np.add(m[1], m[2], out=part)
    np.subtract(part, m[0], out=part)
    np.subtract(m[1], m[2], out=m[1])
    np.subtract(m[1], m[3], out=m[1])
    for target, own, of_the_one_before in ((even, m[0], part), (odd, m[1], m[3])):
        if anew:
            np.copyto(target[first], own[first])
        else:
            np.add(target[first], own[first], out=target[first])
        np.add(own[here], of_the_one_before[behind], out=target[inner])
        np.copyto(target[last], of_the_one_before[last])
