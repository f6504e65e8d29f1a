"""An array as a file holds it, and what it must be before training reads it.

Rules: numbers alone, at least one sample, every value finite in float32. Values are looked at in blocks of a few
megabytes, so an array that is memory-mapped and larger than memory streams through, and who watches is told of each
block. Faults name the first bad value by row and column.
"""

from collections.abc import Callable, Iterator
from mmap import mmap
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from worker.errors import DataFault

BLOCK_BYTES = 1 << 22  # two blocks fit in a core's share of the outer cache; larger ones were no faster
FLOAT32_MAX = np.float64(np.finfo(np.float32).max)  # a float64, so that float16 is compared as float64 too

Index = tuple[int, ...]
Progress: TypeAlias = Callable[[], None]  # is told, every few megabytes, that a pass over much data goes on


def unwatched() -> None:
    """The Progress of a pass that nobody watches."""


def row_and_column(index: Index) -> str:
    """Where an element is, as NumPy counts: (12, 3) -> `row 12, column 3 (counted from 0)`."""
    row, *inner = index
    if not inner:
        return f"row {row} (counted from 0)"
    column = inner[0] if len(inner) == 1 else tuple(inner)
    return f"row {row}, column {column} (counted from 0)"


class StoredArray(NamedTuple):
    """One array of one file."""

    values: NDArray[Any]  # (n, ...) in the file's own type; may be memory-mapped
    place: str  # the file, and the array's name where a file holds several
    locate: Callable[[Index], str] = row_and_column  # names an element in the words of the format


def is_mapped(values: NDArray[Any]) -> bool:
    """The array, or what it is a view of, is a memory-mapped file."""
    base: object = values
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base, mmap)


def row_blocks(values: NDArray[Any], progress: Progress = unwatched) -> Iterator[tuple[int, NDArray[Any]]]:
    """(first row, view of the rows from there on), block after block, each of about BLOCK_BYTES."""
    row_bytes = max(1, values.nbytes // max(1, len(values)))
    rows = max(1, BLOCK_BYTES // row_bytes)
    for start in range(0, len(values), rows):
        progress()
        yield start, values[start : start + rows]


def check_numbers(array: StoredArray, what: str) -> None:
    """DataFault unless the array has rows of real numbers; looks at type and shape alone."""
    values, place, _ = array
    if values.dtype.kind not in "buif":
        raise DataFault(f"{place}: {what} have type {values.dtype}; store them as integers or floats")
    if values.ndim == 0:
        raise DataFault(
            f"{place}: {what} are a single number without a sample axis; give an array of shape (samples, ...)"
        )
    if len(values) == 0:
        raise DataFault(f"{place}: holds 0 samples (shape {values.shape}); at least one is needed")
    if values.size == 0:
        raise DataFault(f"{place}: {what} of shape {values.shape} have no numbers in a sample; at least one is needed")


def check_finite(array: StoredArray, what: str, progress: Progress = unwatched) -> None:
    """DataFault naming the first NaN, infinity, or number that float32 cannot hold."""
    values, place, locate = array
    if values.dtype.kind != "f":
        return
    for start, block in row_blocks(values, progress):
        # Two reductions make no temporary, and a NaN anywhere makes both comparisons false.
        if block.min() >= -FLOAT32_MAX and block.max() <= FLOAT32_MAX:
            continue
        bad = ~(np.abs(block) <= FLOAT32_MAX)
        row, *inner = (int(i) for i in np.unravel_index(int(bad.argmax()), bad.shape))
        value = float(block[(row, *inner)])
        fault = f"{value:g}, which float32 cannot hold" if np.isfinite(value) else f"{value}"
        where = locate((start + row, *inner))
        raise DataFault(
            f"{place}: {what} at {where}: {fault}; every value must be a finite number: mend or drop that row"
        )
