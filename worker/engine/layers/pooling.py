"""Pooling: the largest value or the mean of each window of an image, or the mean of the whole image.

Rules: channels never mix, nothing is trained. What windows see is taken place by place (i, j), all windows of a slice
of images at once, so that an operation runs over long rows and a slice stays in cache. Where windows reach over the
edge (padding `same`) they see only what is inside.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from worker.engine.layers.layer import Takes, Traits
from worker.engine.layers.window import require_image, slide
from worker.engine.params import FloatArray, Parameter, Shape

# Images of a slice, with what surrounds them: their windows and gradients are of the same size or smaller.
SLICE_BYTES: Final = 512 * 1024


class Untrained:
    """What the three share."""

    traits: ClassVar[Traits] = Traits(Takes.IMAGES, keeps_channel_bias=True, passes_scale=True)
    works_in_place: ClassVar[bool] = False
    parameters: tuple[Parameter, ...] = ()

    def attach(self, values: Sequence[FloatArray], gradients: Sequence[FloatArray]) -> None:
        """Nothing to attach."""

    def backward_parameters(self, dy: FloatArray) -> None:
        """Nothing is trained."""


class WindowPool(Untrained, ABC):
    """What the two with windows share: shapes, and slices of images with the value `outside` around them."""

    outside: ClassVar[float]  # what a window may see without changing its result

    def __init__(self, options: Any, input_shape: Shape) -> None:
        """ModelFault where samples are no images, or the window does not fit them."""
        stride = options.stride or options.size
        self.windows = slide(input_shape, "size", options.size, stride, options.padding)
        self.input_shape = input_shape
        self.output_shape: Shape = (self.windows.down.outputs, self.windows.across.outputs, input_shape[2])
        self.takes_tiles = self.images_inside = False

    def take_tiles(self, images_inside: bool) -> None:
        """Images come by `pool` as tiles from now on and their gradient goes by `spread`; see tiles.py."""
        self.takes_tiles, self.images_inside = True, images_inside

    def at(self, padded: FloatArray, place: tuple[int, int]) -> FloatArray:
        """The pixels at one place of every window: a view (n, rows, columns, channels)."""
        return padded[:, *place] if self.takes_tiles else self.windows.at(padded, *place)

    def reserve(self, batch_size: int, dtype: npt.DTypeLike, in_place: bool) -> None:
        """The output, the gradient of the input (only touched when asked for), and what one slice needs.

        Tiles need nothing: they are written over.
        """
        padded = self.windows.padded_shape
        image_bytes = padded[0] * padded[1] * padded[2] * np.dtype(dtype).itemsize
        self.slice_images = min(max(SLICE_BYTES // image_bytes, 1), max(batch_size, 1))
        self.y = np.empty((batch_size, *self.output_shape), dtype)
        self.dx = np.empty((batch_size, *((0,) if self.takes_tiles else self.input_shape)), dtype)
        buffered = 0 if self.takes_tiles else self.slice_images
        self.padded = np.full((buffered, *padded), self.outside, dtype)
        self.d_padded = np.empty_like(self.padded)
        self.part = np.empty((buffered, *self.output_shape), dtype)

    def forward(self, x: FloatArray) -> FloatArray:
        """x (n, height, width, channels) -> (n, rows, columns, channels)."""
        if not self.takes_tiles:
            self.pool(slice(0, len(x)), x)
        return self.y[: len(x)]

    def backward_input(self, dy: FloatArray) -> FloatArray:
        """dL/dx; the derivations are at `spread`."""
        self.dy, dx = dy, self.dx[: len(dy)]
        if not self.takes_tiles:
            self.spread(slice(0, len(dy)), dx)
        return dx

    @abstractmethod
    def pool(self, images: slice, maps: FloatArray) -> None:
        """The output for these images of the batch."""

    @abstractmethod
    def spread(self, images: slice, d_maps: FloatArray) -> None:
        """Write dL/dx of these images of the batch, given the dy of all of it."""

    def slices(self, images: slice) -> Iterator[tuple[slice, slice]]:
        """Images cut into slices that stay in cache: where each lies in the batch, and where among these images."""
        if self.takes_tiles:
            yield images, slice(0, images.stop - images.start)
            return
        for first in range(images.start, images.stop, self.slice_images):
            last = min(first + self.slice_images, images.stop)
            yield slice(first, last), slice(first - images.start, last - images.start)

    def surround(self, x: FloatArray) -> FloatArray:
        """x with what `same` adds around it; x itself where that is nothing."""
        if not self.windows.is_padded:
            return x
        padded = self.padded[: len(x)]
        self.windows.inside(padded)[...] = x
        return padded


class MaxPool2d(WindowPool):
    """y = the largest value that a window sees."""

    reads_output: ClassVar[bool] = False
    outside: ClassVar[float] = -np.inf

    def reserve(self, batch_size: int, dtype: npt.DTypeLike, in_place: bool) -> None:
        """Also where each place but the first sees more than all before it, and what is left of a slice's gradient."""
        super().reserve(batch_size, dtype, in_place)
        rows, columns, channels = self.output_shape
        places = len(self.windows.positions) - 1
        if self.images_inside:
            exceeds = np.empty((places, rows, columns, batch_size, channels), np.bool_)
            self.exceeds = exceeds.transpose(0, 3, 1, 2, 4)
        else:
            self.exceeds = np.empty((places, batch_size, rows, columns, channels), np.bool_)
        self.rest = np.empty_like(self.part)

    def pool(self, images: slice, maps: FloatArray) -> None:
        """The largest of each window.

        What backward needs is a byte for each value compared, found here while the slice is in cache: to read the
        images again took a third of backward's time.
        """
        first, *others = self.windows.positions
        for here, among in self.slices(images):
            padded, y = self.surround(maps[among]), self.y[here]
            largest = self.at(padded, first)
            room = largest if self.takes_tiles else y
            for place, exceeds in zip(others, self.exceeds, strict=True):
                seen = self.at(padded, place)
                np.greater(seen, largest, out=exceeds[here])
                largest = np.maximum(largest, seen, out=y if place == others[-1] else room)
            if not others:
                np.copyto(y, largest)

    def spread(self, images: slice, d_maps: FloatArray) -> None:
        """dL/dx = sum of dL/dy over the windows that x is the largest value of.

        y = x_ij for the place i, j of the largest, so dy/dx is 1 there and 0 elsewhere. Of equal values the first takes
        all, as in PyTorch: it is at the last place that sees more than all before it, which is asked first. Where
        windows tile the image each part is written where it belongs, what is left to the first place; elsewhere parts
        are added up.
        """
        first, *others = self.windows.positions
        for here, among in self.slices(images):
            rest, tile = self.dy[here], self.windows.tile
            target = d_maps[among] if tile else self.d_padded[: len(rest)]
            left = self.at(target, first) if self.takes_tiles else self.rest[: len(rest)]
            if not tile:
                target[...] = 0
            if self.images_inside:  # one pass in short runs instead of two
                np.copyto(left, rest)
                rest = left
            for place, exceeds in zip(reversed(others), self.exceeds[::-1], strict=True):
                pixels = self.at(target, place)
                part = pixels if self.takes_tiles else self.part[: len(rest)]
                np.copyto(part, exceeds[here])  # a product of booleans and floats takes twice as long
                taken = np.multiply(part, rest, out=pixels if tile else part)
                rest = np.subtract(rest, taken, out=left)
                if not tile:
                    np.add(pixels, taken, out=pixels)
            pixels = self.at(target, first)
            if not tile:
                np.add(pixels, rest, out=pixels)
                d_maps[among] = self.windows.inside(target)
            elif not (self.takes_tiles and others):  # else it is there already
                np.copyto(pixels, rest)


class AveragePool2d(WindowPool):
    """y = the mean of what a window sees; pixels outside the image are not counted."""

    reads_output: ClassVar[bool] = False
    outside: ClassVar[float] = 0.0

    def reserve(self, batch_size: int, dtype: npt.DTypeLike, in_place: bool) -> None:
        """Also one over the number of pixels each window sees."""
        super().reserve(batch_size, dtype, in_place)
        ones = np.zeros((1, *self.windows.padded_shape))
        self.windows.inside(ones)[...] = 1
        counts = np.add.reduce([self.windows.at(ones, *place)[0] for place in self.windows.positions])
        self.shares = np.asarray(1 / counts, dtype)

    def pool(self, images: slice, maps: FloatArray) -> None:
        """The mean of each window."""
        for here, among in self.slices(images):
            padded, y = self.surround(maps[among]), self.y[here]
            total = self.at(padded, (0, 0))
            room = total if self.takes_tiles else y
            for place in self.windows.positions[1:]:
                total = np.add(total, self.at(padded, place), out=room)
            np.multiply(total, self.shares, out=y)

    def spread(self, images: slice, d_maps: FloatArray) -> None:
        """dL/dx = sum of dL/dy / k over the windows that see x, k the pixels each of them sees.

        y = (x_1 + ... + x_k) / k, so dy/dx is 1/k for each of them.
        """
        for here, among in self.slices(images):
            first, *others = self.windows.positions
            if self.takes_tiles:
                part = np.multiply(self.dy[here], self.shares, out=self.at(d_maps[among], first))
                for place in others:
                    np.copyto(self.at(d_maps[among], place), part)
                continue
            part = np.multiply(self.dy[here], self.shares, out=self.part[: here.stop - here.start])
            if self.windows.tile:
                for place in self.windows.positions:
                    np.copyto(self.at(d_maps[among], place), part)
                continue
            d_padded = self.d_padded[: len(part)]
            d_padded[...] = 0
            for place in self.windows.positions:
                target = self.at(d_padded, place)
                np.add(target, part, out=target)
            d_maps[among] = self.windows.inside(d_padded)


class GlobalAveragePool(Untrained):
    """y_c = the mean of channel c over the whole image: (height, width, channels) becomes (channels,)."""

    reads_output: ClassVar[bool] = False

    def __init__(self, options: Any, input_shape: Shape) -> None:
        """ModelFault where samples are no images."""
        require_image(input_shape)
        self.input_shape = input_shape
        self.pixels = input_shape[0] * input_shape[1]
        self.output_shape: Shape = (input_shape[2],)

    def reserve(self, batch_size: int, dtype: npt.DTypeLike, in_place: bool) -> None:
        """The output and the gradient of the input, the latter only touched when asked for."""
        self.y = np.empty((batch_size, *self.output_shape), dtype)
        self.dx = np.empty((batch_size, *self.input_shape), dtype)

    def forward(self, x: FloatArray) -> FloatArray:
        """x (n, height, width, channels) -> (n, channels)."""
        y = self.y[: len(x)]
        np.add.reduce(x.reshape(len(x), self.pixels, *self.output_shape), axis=1, out=y)
        return np.divide(y, self.pixels, out=y)

    def backward_input(self, dy: FloatArray) -> FloatArray:
        """dL/dx_uvc = dL/dy_c / k for each of the k pixels: y_c = (x_1c + ... + x_kc) / k."""
        dx = self.dx[: len(dy)]
        np.divide(dy, self.pixels, out=dy)
        dx[...] = dy[:, None, None, :]
        return dx
