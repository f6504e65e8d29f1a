"""Maps handed to the pooling behind them slice by slice, each while it is in cache.

Rules: a map (rows, columns, channels) that windows of down x across pixels tile is handed over as tiles (down, across,
rows / down, columns / across, channels): what place (i, j) of every window sees then lies together, and an operation
runs over it in one go instead of over the channels of one pixel at a time. Only a convolution gives tiles and only a
pooling whose windows tile its image takes them; which values there are, and their names, is not changed by it.

A slice is some images of the batch. The pooling takes its maps, which it may write over, and gives their gradient when
asked: maps of a whole batch never exist, and what the two layers hand on through the chain holds no values.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy.typing as npt

from worker.engine.layers.window import Windows
from worker.engine.params import FloatArray, Shape


class Tile(NamedTuple):
    """The pixels of one window."""

    down: int
    across: int

    def shape(self, map_shape: Shape) -> Shape:
        """That of a map (rows, columns, channels) as tiles."""
        rows, columns, channels = map_shape
        return (self.down, self.across, rows // self.down, columns // self.across, channels)

    def split(self, maps: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A view of (n, rows, columns, ...) as tiles: (n, down, across, rows / down, columns / across, ...)."""
        samples, rows, columns, *rest = maps.shape
        parts = maps.reshape(samples, rows // self.down, self.down, columns // self.across, self.across, *rest)
        return parts.transpose(0, 2, 4, 1, 3, *range(5, parts.ndim))


@runtime_checkable
class GivesTiles(Protocol):
    """A layer that can hand its maps over as tiles, and takes their gradient so."""

    # In memory a slice's tiles lie row by row and column by column with its images inside, and not image by image.
    images_inside: bool

    def give_tiles(self, tile: Tile, pooling: "TakesTiles") -> bool:
        """Whether it does from now on."""


@runtime_checkable
class TakesTiles(Protocol):
    """A layer that can take its maps as tiles, and hands their gradient on so."""

    windows: Windows

    def take_tiles(self, images_inside: bool) -> None:
        """They come by `pool` and their gradient goes by `spread`: `forward` and `backward_input` only pass by."""

    def pool(self, images: slice, maps: FloatArray) -> None:
        """The output for these images of the batch, whose maps (n, *tiles) are given, to be written over."""

    def spread(self, images: slice, d_maps: FloatArray) -> None:
        """Write the gradient of these images' maps, given that of the whole output; may be asked for again."""


def join(before: object, behind: object) -> None:
    """Let one layer hand tiles to the next, where both can."""
    if isinstance(before, GivesTiles) and isinstance(behind, TakesTiles) and behind.windows.tile:
        tile = Tile(behind.windows.down.window, behind.windows.across.window)
        if before.give_tiles(tile, behind):
            behind.take_tiles(before.images_inside)
