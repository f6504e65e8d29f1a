"""What every wire format is to those who use it: float32 arrays to fewer bytes and back, a block at a time.

Rules: a block's size in bytes depends on its number of elements alone, so that receivers know what comes. Blocks stay
in cache through the passes over them. A codec owns scratch memory: one codec for each thread. Encoding changes no
argument but `out`. What is not finite is not hidden: a value that is nan or infinite decodes to one that is not finite,
and where a scale is shared so does its group; a finite value beside none that is not stays finite, because one that is
too large for the format saturates.

Error feedback: what encoding lost is kept in a residual and added to what is encoded next, so that nothing is lost but
deferred: the sum of all that was sent, plus the residual, is the sum of all that was to be sent (Seide et al. 2014,
"1-Bit Stochastic Gradient Descent"; Karimireddy et al. 2019, "Error Feedback Fixes SignSGD", which shows that it
converges as SGD does for every codec C with |x - C(x)|^2 <= (1 - d) |x|^2, d > 0).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Float32: TypeAlias = NDArray[np.float32]
Bytes: TypeAlias = NDArray[np.uint8]

BLOCK_ELEMENTS = (
    65536  # 256 KB: a block, its residual and scratch fit a second-level cache; an index within takes 16 bits
)


class Codec(Protocol):
    """One wire format. Arrays are 1-D and contiguous, of at most BLOCK_ELEMENTS elements."""

    def size(self, elements: int) -> int:
        """Bytes of an encoded block of so many elements."""

    def encode(self, values: Float32, out: Bytes) -> None:
        """Fill `out`, of `size(len(values))` bytes."""

    def decode(self, encoded: Bytes, out: Float32) -> None:
        """Fill `out` with what the bytes say."""


def blocks(codec: Codec, elements: int) -> Iterator[tuple[slice, slice]]:
    """Where each block lies: among the elements, and among the bytes."""
    position = 0
    for low in range(0, elements, BLOCK_ELEMENTS):
        high = min(low + BLOCK_ELEMENTS, elements)
        after = position + codec.size(high - low)
        yield slice(low, high), slice(position, after)
        position = after


def encoded_bytes(codec: Codec, elements: int) -> int:
    """Bytes of an array of any length."""
    full, rest = divmod(elements, BLOCK_ELEMENTS)
    return full * codec.size(BLOCK_ELEMENTS) + (codec.size(rest) if rest else 0)


def encode(codec: Codec, values: Float32, out: Bytes) -> None:
    """Encode an array of any length into `out`, of `encoded_bytes(codec, len(values))`."""
    for here, there in blocks(codec, len(values)):
        codec.encode(values[here], out[there])


def decode(codec: Codec, encoded: Bytes, out: Float32) -> None:
    """Decode an array of any length.

    Raises:
        ValueError: there are more or fewer bytes than `len(out)` elements take.
    """
    needed = encoded_bytes(codec, len(out))
    if len(encoded) != needed:
        raise ValueError(f"{len(encoded)} bytes, {len(out)} elements take {needed}")
    for here, there in blocks(codec, len(out)):
        codec.decode(encoded[there], out[here])


def encode_with_feedback(
    codec: Codec, values: Float32, scale: np.float32, residual: Float32, out: Bytes, scratch: Float32
) -> None:
    """Encode `scale * values + residual` and leave in `residual` what that lost.

    Args:
        scratch: at least min(BLOCK_ELEMENTS, len(values)) elements; overwritten.
    """
    for here, there in blocks(codec, len(values)):
        left, decoded = residual[here], scratch[: here.stop - here.start]
        np.multiply(values[here], scale, out=decoded)
        np.add(left, decoded, out=left)
        codec.encode(left, out[there])
        codec.decode(out[there], decoded)
        np.subtract(left, decoded, out=left)


def rows(array: NDArray[np.generic], width: int) -> list[NDArray[np.generic]]:
    """A block as rows of `width` elements that each share a scale: the full ones, then the short one; views."""
    full = len(array) // width * width
    whole = [array[:full].reshape(-1, width)] if full else []
    return [*whole, array[full:].reshape(1, -1)] if full < len(array) else whole
