"""Two-dimensional convolution of images, as matrix products over slices that stay in cache.

Rules: images are (height, width, channels), a weight is (kernel height, kernel width, channels, filters). A batch is
worked through a few images at a time (of large images a few rows), so that what is unfolded from them never leaves the
cache; every buffer is made in `reserve`. A pooling behind may take each slice at once (tiles.py). Where winograd.py
does the same with fewer products it is asked instead, and so is patches.py where a pooling lets it unfold less.
"""

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from protos import job_pb2
from worker.engine.layers import patches, winograd
from worker.engine.layers.layer import Takes, Traits
from worker.engine.layers.patches import SHORT_RUN, Patches
from worker.engine.layers.tiles import TakesTiles, Tile
from worker.engine.layers.window import slide
from worker.engine.params import FloatArray, Parameter, Shape
from worker.errors import ModelFault

# What one slice unfolds to: an L2 of today. Smaller slices pay for more calls, a whole batch is a third slower.
SLICE_BYTES: Final = 1024 * 1024


class Block(NamedTuple):
    """Part of a batch: some images, or some rows of output of one image."""

    images: slice
    rows: slice


class Conv2d:
    """y_pqf = b_f + sum over i, j, c of x_(p s + i)(q s + j)c W_ijcf, x as padded.

    The sum is one matrix product Y = U W: U (windows, kernel height * kernel width * channels + 1) has in each row what
    one window sees and a 1 behind it, and W (the same, filters) is the weight, which lies in memory as it must, and the
    bias below it. (Chellapilla et al. 2006; known as im2col. A bias added by itself is another pass over the output.)
    """

    traits: ClassVar[Traits] = Traits(Takes.IMAGES, channel_bias="bias")
    reads_output: ClassVar[bool] = False
    works_in_place: ClassVar[bool] = False

    def __init__(self, options: job_pb2.Conv2dLayer, input_shape: Shape) -> None:
        """ModelFault where samples are no images, or the kernel does not fit them."""
        self.windows = slide(input_shape, "kernel", options.kernel, options.stride or (1,), options.padding)
        self.filters = options.filters
        if self.filters < 1:
            raise ModelFault(f"filters: {self.filters} is not at least 1")
        if not options.HasField("bias"):
            raise ModelFault("bias: is absent, a resolved job has it")
        down, across, channels = self.windows
        self.input_shape = input_shape
        self.output_shape: Shape = (down.outputs, across.outputs, self.filters)
        self.is_winograd = winograd.pays(self.windows, self.filters)
        self.is_patched = False
        self.tile: Tile | None = None
        self.pooling: TakesTiles | None = None  # is given each slice's maps, and gives their gradient
        area = down.window * across.window
        self.seen_values = area * channels
        shape = (down.window, across.window, channels, self.filters)
        weight = Parameter("weight", shape, fan_in=self.seen_values, fan_out=area * self.filters)
        bias = Parameter("bias", (self.filters,), fan_in=0, fan_out=0)
        self.parameters: tuple[Parameter, ...] = (weight, bias) if options.bias else (weight,)

    @property
    def images_inside(self) -> bool:
        """As winograd.py lays its slices out."""
        return self.is_winograd

    def give_tiles(self, tile: Tile, pooling: TakesTiles) -> bool:
        """Where slices are whole images; Winograd's own tiles are 2 x 2."""
        rows, columns, _ = self.output_shape
        if self.is_winograd:
            image_bytes = winograd.image_bytes(self.output_shape, self.windows.channels, 4)
            gives = tile == (2, 2) and image_bytes <= winograd.SLICE_BYTES
        else:
            gives = 4 * rows * columns * self.seen_values <= SLICE_BYTES
        if gives:
            self.tile, self.pooling = tile, pooling
            self.is_patched = not self.is_winograd and patches.pays(self.windows, tile)
        return gives

    def attach(self, values: Sequence[FloatArray], gradients: Sequence[FloatArray]) -> None:
        """Take views: weight (kernel height, kernel width, channels, filters), bias (filters,) if there is one."""
        self.weight, *self.bias = values
        if gradients:
            self.d_weight, *self.d_bias = gradients

    def reserve(self, batch_size: int, dtype: npt.DTypeLike, in_place: bool) -> None:
        """The output, the gradient of the input (only touched when asked for), and what one slice needs."""
        maps = self.tile.shape(self.output_shape) if self.tile else self.output_shape
        self.dx = np.empty((batch_size, *self.input_shape), dtype)
        self.handed_on = np.empty((batch_size, 0), dtype)
        if self.is_patched:
            assert self.tile is not None
            assert self.pooling is not None
            self.patches = Patches(
                self.windows, self.tile, self.filters, bool(self.bias), batch_size, dtype, self.pooling
            )
            return
        if self.is_winograd:
            self.y = np.empty((0 if self.pooling else batch_size, *self.output_shape), dtype)
            self._reserve_winograd(batch_size, dtype)
            return
        rows, columns, _ = self.output_shape
        row_bytes = columns * self.seen_values * np.dtype(dtype).itemsize
        self.slice_rows = rows if self.tile else min(max(SLICE_BYTES // row_bytes, 1), rows)
        image_bytes = row_bytes * rows
        if self.pooling:  # which reads and writes the maps while they are in the cache too
            image_bytes += math.prod(maps) * np.dtype(dtype).itemsize
        self.slice_images = min(max(SLICE_BYTES // image_bytes, 1), max(batch_size, 1))
        self.y = np.empty((self.slice_images if self.pooling else batch_size, *maps), dtype)
        self.d_y = np.empty_like(self.y if self.pooling else self.y[:0])
        # What surrounds the image is written here, once, and stays 0.
        self.padded = np.zeros((self.slice_images, *self.windows.padded_shape), dtype)
        self.d_padded = np.empty_like(self.padded)
        self.seen = self.windows.seen(self.padded)
        windows = self.slice_images * self.slice_rows * columns
        self.factors = np.empty((self.seen_values + len(self.bias), self.filters), dtype)
        self.d_factors, self.d_factors_part = np.empty_like(self.factors), np.empty_like(self.factors)
        self.unfolded = np.empty(windows * len(self.factors), dtype)
        self.d_seen = np.empty(windows * self.windows.channels, dtype)
        self.d_plain = np.empty((self.slice_images if self.tile else 0, *self.output_shape), dtype)

    def _reserve_winograd(self, batch_size: int, dtype: npt.DTypeLike) -> None:
        """What winograd.py needs."""
        before = (self.windows.down.before, self.windows.across.before)
        self.winograd = winograd.Winograd(self.input_shape, self.output_shape, before, batch_size, dtype, self.pooling)
        self.factors = np.empty((16, self.windows.channels, self.filters), dtype)

    def forward(self, x: FloatArray) -> FloatArray:
        """x (n, height, width, channels) -> (n, rows, columns, filters), or what is handed on where that is pooled."""
        self.x = x
        y = self.handed_on[: len(x)] if self.pooling else self.y[: len(x)]
        if self.is_patched:
            self.patches.convolve(x, self.weight, self.bias)
            return y
        if self.is_winograd:
            self.winograd.convolve(x, winograd.factors(self.weight, self.factors), self.bias, y)
            return y
        self.factors[: self.seen_values] = self.weight.reshape(self.seen_values, self.filters)
        for bias in self.bias:
            self.factors[self.seen_values] = bias
        for block in self._blocks(len(x)):
            if self.pooling:
                maps = self.y[: block.images.stop - block.images.start]
                np.matmul(self._unfold(block), self.factors, out=maps.reshape(-1, self.filters))
                self.pooling.pool(block.images, maps)
            else:
                np.matmul(self._unfold(block), self.factors, out=self._matrix(self.y, block))
        return y

    def backward_parameters(self, dy: FloatArray) -> None:
        """dL/dW_ijcf = sum over windows p, q of x_(p s + i)(q s + j)c dL/dy_pqf, dL/db_f = sum of dL/dy_pqf.

        dy_pqf/dW_ijcf is the value that stands at place i, j, c of window p, q: U^T dY. U is unfolded again, which
        costs less than keeping it: the whole batch's would not stay in the cache.
        """
        if self.is_patched:
            self.patches.parameter_gradients(len(dy), self.d_weight, self.d_bias)
            return
        if self.is_winograd:  # with the input's gradient, which is made of the same parts
            self.winograd.gradients(self.x, self.factors, dy, self.d_weight, self.d_bias, self.dx[: len(dy)])
            return
        self.d_factors[...] = 0
        for block in self._blocks(len(dy)):
            np.matmul(self._unfold(block).T, self._matrix(dy, block), out=self.d_factors_part)
            np.add(self.d_factors, self.d_factors_part, out=self.d_factors)
        self.d_weight.reshape(self.seen_values, self.filters)[...] = self.d_factors[: self.seen_values]
        for d_bias in self.d_bias:
            d_bias[...] = self.d_factors[self.seen_values]

    def backward_input(self, dy: FloatArray) -> FloatArray:
        """dL/dx_uvc = sum over all p, q, i, j with p s + i = u and q s + j = v of sum over f of W_ijcf dL/dy_pqf.

        For one place i, j of the kernel that is dY W_ij^T, added to every s-th pixel from i, j on: as many products as
        the kernel has places, each added while it is in cache, in runs as long as a row of the image.
        """
        if self.is_patched:
            self.patches.input_gradient(self.dx[: len(dy)])
        if self.is_patched or self.is_winograd:
            return self.dx[: len(dy)]
        for block in self._blocks(len(dy)):
            images = block.images.stop - block.images.start
            d_padded = self.d_padded[:images]
            if block.rows.start == 0:
                d_padded[...] = 0
            d_block = self._row_by_row(dy, block)
            shape = (images, block.rows.stop - block.rows.start, self.output_shape[1], self.windows.channels)
            d_seen = self.d_seen[: len(d_block) * self.windows.channels].reshape(len(d_block), self.windows.channels)
            for i, j in self.windows.positions:
                np.matmul(d_block, self.weight[i, j].T, out=d_seen)
                target = self.windows.at(d_padded, i, j)[:, block.rows]
                np.add(target, d_seen.reshape(shape), out=target)
            if block.rows.stop == self.output_shape[0]:
                self.dx[block.images] = self.windows.inside(d_padded)
        return self.dx[: len(dy)]

    def _blocks(self, samples: int) -> Iterator[Block]:
        """The batch cut into slices; several images only where whole images fit."""
        rows = self.output_shape[0]
        for first in range(0, samples, self.slice_images):
            images = slice(first, min(first + self.slice_images, samples))
            for top in range(0, rows, self.slice_rows):
                yield Block(images, slice(top, min(top + self.slice_rows, rows)))

    def _matrix(self, maps: FloatArray, block: Block) -> FloatArray:
        """A block of the maps as a matrix (windows, filters), a view; windows in the order in which maps lie."""
        if self.pooling:
            return self._spread(block).reshape(-1, self.filters)
        return maps[block.images, block.rows].reshape(-1, self.filters)

    def _spread(self, block: Block) -> FloatArray:
        """The gradient of a block's maps, from the pooling."""
        assert self.pooling is not None
        d_maps = self.d_y[: block.images.stop - block.images.start]
        self.pooling.spread(block.images, d_maps)
        return d_maps

    def _row_by_row(self, maps: FloatArray, block: Block) -> FloatArray:
        """A block of the maps as a matrix (windows, filters), windows row by row."""
        if self.tile is None:
            return self._matrix(maps, block)
        plain = self.d_plain[: block.images.stop - block.images.start]
        np.copyto(self.tile.split(plain), self._spread(block))
        return plain.reshape(-1, self.filters)

    def _unfold(self, block: Block) -> FloatArray:
        """U of a block: what each window sees, (windows, kernel height * kernel width * channels)."""
        images = block.images.stop - block.images.start
        if block.rows.start == 0:
            self.windows.inside(self.padded[:images])[...] = self.x[block.images]
        seen = self.seen[:images, block.rows]
        if self.tile:
            seen = self.tile.split(seen)
        ones = len(self.bias)
        width = self.seen_values + ones
        values = self.unfolded[: seen.size // self.seen_values * width]
        if seen.shape[-2] * seen.shape[-1] < SHORT_RUN:  # value by value: runs along the image are longer
            by_value = values.reshape(width, -1)
            order = (*range(seen.ndim - 3, seen.ndim), *range(seen.ndim - 3))
            target = by_value[: self.seen_values].reshape([seen.shape[axis] for axis in order])
            np.copyto(target, seen.transpose(order))
            by_value[self.seen_values :] = 1
            return by_value.T
        by_window = values.reshape(*seen.shape[:-3], width)
        np.copyto(by_window[..., : self.seen_values].reshape(seen.shape), seen)
        by_window[..., self.seen_values :] = 1
        return by_window.reshape(-1, width)
