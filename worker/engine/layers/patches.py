"""Convolution of images of few channels in front of a pooling, one unfolded patch for all outputs of a pooled window.

The kernels' windows of the down x across outputs that one pooling window sees overlap: together they see one patch of
((down - 1) stride + kernel height) x ((across - 1) stride + kernel width) pixels. U (patch values + 1, patches) has in
each column what one patch sees and a 1 below it, and the output at place (i, j) of every pooling window is the product
U^T W_ij: W_ij has the weight where the window of place (i, j) lies in the patch, 0 elsewhere, and the bias in its last
row. For 3 x 3 kernels and 2 x 2 places 16 values are unfolded for 4 outputs, not 36, at 17/10 of the products, which
with so few values to add up take hardly longer: writing the outputs is what they wait for.

Rules: slices are whole images and stay in cache; U is kept from forward to backward, half as much for 3 x 3 kernels and
2 x 2 places as all windows unfold to; buffers are made once.
"""

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from worker.engine.layers.tiles import TakesTiles, Tile
from worker.engine.layers.window import Windows
from worker.engine.params import FloatArray

# What one slice unfolds to and its maps: half as much again was half slower.
SLICE_BYTES: Final = 1024 * 1024
# Windows of fewer values a row than this are unfolded value by value, which takes longer than their products.
SHORT_RUN: Final = 16


def pays(windows: Windows, tile: Tile) -> bool:
    """Whether unfolding windows is slow, and patches make the products no more than twice as many."""
    across = windows.across.window * windows.channels
    rows, columns = _patch(windows, tile)
    return across < SHORT_RUN and rows * columns <= 2 * windows.down.window * windows.across.window


class Patches:
    """y_pqf = b_f + sum over i, j, c of x_(p s + i)(q s + j)c W_ijcf, given to the pooling behind, in own buffers."""

    def __init__(
        self, windows: Windows, tile: Tile, filters: int, has_bias: bool, batch_size: int, dtype: npt.DTypeLike,
        pooling: TakesTiles,
    ) -> None:  # fmt: skip
        """`tile` is what a window of `pooling` sees."""
        self.windows, self.tile, self.filters, self.pooling = windows, tile, filters, pooling
        down, across, channels = windows
        self.patch = _patch(windows, tile)
        self.values = self.patch[0] * self.patch[1] * channels
        self.step = (tile.down * down.stride, tile.across * across.stride)  # from one patch to the next
        self.outputs = (down.outputs // tile.down, across.outputs // tile.across)
        patches = self.outputs[0] * self.outputs[1]
        width, places = self.values + has_bias, tile.down * tile.across
        image_bytes = patches * (width + places * filters) * np.dtype(dtype).itemsize
        self.slice_images = min(max(SLICE_BYTES // image_bytes, 1), max(batch_size, 1))
        slices = -(-batch_size // self.slice_images)
        # What surrounds the image is written here, once, and stays 0; and so where U is 1.
        self.padded = np.zeros((self.slice_images, *windows.padded_shape), dtype)
        self.d_padded = np.empty_like(self.padded)
        seen = np.lib.stride_tricks.sliding_window_view(self.padded, self.patch, (1, 2))
        self.seen = seen[:, :: self.step[0], :: self.step[1]].transpose(4, 5, 3, 0, 1, 2)
        self.unfolded = np.empty((slices, width * patches * self.slice_images), dtype)
        self.maps = np.empty(places * patches * self.slice_images * filters, dtype)
        self.factors = np.zeros((places, width, filters), dtype)
        self.d_factors = np.empty((2, places, width, filters), dtype)
        self.d_seen = np.empty((2, patches * self.slice_images, width), dtype)

    def convolve(self, x: FloatArray, weight: FloatArray, bias: Sequence[FloatArray]) -> None:
        """x (n, height, width, channels), weight (kernel height, kernel width, channels, filters), bias (filters,)."""
        for factors, window in self._windows(self.factors):
            window[...] = weight
            for values in bias:
                factors[self.values] = values
        for number, images in self._slices(len(x)):
            count = images.stop - images.start
            self.windows.inside(self.padded[:count])[...] = x[images]
            unfolded = self._unfolded(number, count)
            seen = self.seen[:, :, :, :count]
            np.copyto(unfolded[: self.values].reshape(seen.shape), seen)
            unfolded[self.values :] = 1
            maps = self._maps(count)
            np.matmul(unfolded.T, self.factors, out=maps)
            self.pooling.pool(images, self._as_tiles(maps))

    def parameter_gradients(self, samples: int, d_weight: FloatArray, d_bias: Sequence[FloatArray]) -> None:
        """dL/dW_ijcf and dL/db_f of so many samples, after `convolve`.

        dL/dW_ij = U dL/dY_ij; of each the part where the weight stands is dL/dW's and the last row dL/db's.
        """
        total, part = self.d_factors
        total[...] = 0
        for number, images in self._slices(samples):
            count = images.stop - images.start
            np.matmul(self._unfolded(number, count), self._d_maps(images), out=part)
            np.add(total, part, out=total)
        for values in (d_weight, *d_bias):
            values[...] = 0
        for factors, window in self._windows(total):
            np.add(d_weight, window, out=d_weight)
            for values in d_bias:
                np.add(values, factors[self.values], out=values)

    def input_gradient(self, dx: FloatArray) -> None:
        """dL/dU^T = sum over places of dL/dY_ij W_ij^T, added up where patches overlap."""
        for _, images in self._slices(len(dx)):
            count = images.stop - images.start
            d_maps = self._d_maps(images)
            total, part = self.d_seen[:, : d_maps.shape[1]]
            total[...] = 0
            for d_place, factors in zip(d_maps, self.factors, strict=True):
                np.matmul(d_place, factors.T, out=part)
                np.add(total, part, out=total)
            d_seen = total[:, : self.values].reshape(count, *self.outputs, *self.patch, self.windows.channels)
            d_padded = self.d_padded[:count]
            d_padded[...] = 0
            for i in range(self.patch[0]):
                for j in range(self.patch[1]):
                    rows, columns = (
                        slice(first, first + step * (outputs - 1) + 1, step)
                        for first, step, outputs in zip((i, j), self.step, self.outputs, strict=True)
                    )
                    target = d_padded[:, rows, columns]
                    np.add(target, d_seen[:, :, :, i, j], out=target)
            dx[images] = self.windows.inside(d_padded)

    def _slices(self, samples: int) -> Iterator[tuple[int, slice]]:
        """The batch cut into slices, numbered."""
        for number, first in enumerate(range(0, samples, self.slice_images)):
            yield number, slice(first, min(first + self.slice_images, samples))

    def _unfolded(self, number: int, count: int) -> FloatArray:
        """U of a slice of `count` images."""
        width = self.factors.shape[1]
        return self.unfolded[number, : width * self.outputs[0] * self.outputs[1] * count].reshape(width, -1)

    def _maps(self, count: int) -> FloatArray:
        """Room for the maps of `count` images: (places, patches, filters)."""
        patches = self.outputs[0] * self.outputs[1] * count
        return self.maps[: len(self.factors) * patches * self.filters].reshape(-1, patches, self.filters)

    def _d_maps(self, images: slice) -> FloatArray:
        """Their gradient, from the pooling."""
        d_maps = self._maps(images.stop - images.start)
        self.pooling.spread(images, self._as_tiles(d_maps))
        return d_maps

    def _as_tiles(self, maps: FloatArray) -> FloatArray:
        """Maps (places, patches, filters) seen as (n, *tiles)."""
        return maps.reshape(*self.tile, -1, *self.outputs, self.filters).transpose(2, 0, 1, 3, 4, 5)

    def _windows(self, factors: FloatArray) -> Iterator[tuple[FloatArray, FloatArray]]:
        """Of each place's factors (width, filters): they, and where in them the weight stands."""
        down, across, channels = self.windows
        for number, place in enumerate(np.ndindex(*self.tile)):
            of_patch = factors[number, : self.values].reshape(*self.patch, channels, self.filters)
            top, left = place[0] * down.stride, place[1] * across.stride
            yield factors[number], of_patch[top : top + down.window, left : left + across.window]


def _patch(windows: Windows, tile: Tile) -> tuple[int, int]:
    """Rows and columns that the windows of a tile's outputs see together."""
    rows, columns = ((size - 1) * axis.stride + axis.window for size, axis in zip(tile, windows[:2], strict=True))
    return rows, columns
