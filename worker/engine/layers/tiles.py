"""Maps laid out for the pooling behind them.

Rules: a map (rows, columns, channels) that windows of down x across pixels tile may lie in memory as tiles (down,
across, rows / down, columns / across, channels): what place (i, j) of every window sees then lies together, and an
operation runs over it in one go instead of over the channels of one pixel at a time. Only a convolution gives tiles and
only a pooling whose windows tile its image takes them; which values there are, and their names, is not changed by it.

Where the convolution works slice by slice of whole images, each slice is pooled while it is in cache, and so it is with
the gradient: maps of a whole batch never exist, and what the two layers hand on through the chain holds no values.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
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
    """A layer that can put its maps out as tiles, and takes their gradient so."""

    def give_tiles(self, tile: Tile) -> bool:
        """Whether it does from now on."""

    def give_slices(self, pooling: "TakesTiles") -> bool:
        """Whether it hands tiles over slice by slice from now on."""


@runtime_checkable
class TakesTiles(Protocol):
    """A layer that can take its maps as tiles, and hands their gradient on so."""

    windows: Windows

    def take_tiles(self, tile: Tile) -> None:
        """It is given tiles from now on."""

    def take_slices(self) -> None:
        """They come by `pool` and their gradient goes by `spread`: `forward` and `backward_input` only pass by."""

    def pool(self, images: slice, maps: FloatArray) -> None:
        """The output for these images of the batch, whose maps are given."""

    def spread(self, images: slice, d_maps: FloatArray) -> None:
        """Write the gradient of these images' maps, given that of the whole output; may be asked for again."""


def join(before: object, behind: object) -> None:
    """Let one layer hand tiles to the next, where both can."""
    if isinstance(before, GivesTiles) and isinstance(behind, TakesTiles) and behind.windows.tile:
        tile = Tile(behind.windows.down.window, behind.windows.across.window)
        if before.give_tiles(tile):
            behind.take_tiles(tile)
            if before.give_slices(behind):
                behind.take_slices()


def quarters(maps: FloatArray, tiled: bool) -> list[list[FloatArray]]:
    """Views [i][j] of every second row from i on and every second column from j on, (n, rows, columns, channels).

    `tiled`: the maps lie as tiles of 2 x 2. Plain ones may have an odd number of rows or columns.
    """
    return [[maps[:, i, j] if tiled else maps[:, i::2, j::2] for j in (0, 1)] for i in (0, 1)]


def copy_from_tiles(tiled: FloatArray, plain: FloatArray, tile: Tile) -> None:
    """Write maps that lie as tiles into plain ones (n, rows, columns, channels)."""
    np.copyto(tile.split(plain), tiled)
