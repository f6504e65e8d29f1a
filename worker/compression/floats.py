"""Floating-point numbers of 32 and 16 bits: the wire formats that round each element by itself.

| format   | bits of exponent and fraction | relative error | from          | to           |
|----------|-------------------------------|----------------|---------------|--------------|
| float32  | 8, 23                         | none           |               |              |
| float16  | 5, 10 (IEEE 754 binary16)     | 2^-11          | 6.1e-5        | 65504        |
| bfloat16 | 8, 7 (Kalamkar et al. 2019)   | 2^-8           | 1.2e-38       | 3.39e38      |

Below "from", where numbers are subnormal, the error is at most half the smallest one: 2^-25 and 2^-134. Both round to
nearest, ties to even. Above "to" a finite value saturates.
"""

from __future__ import annotations

import numpy as np

from worker.compression.codec import BLOCK_ELEMENTS, Bytes, Float32

FLOAT16_MAX = np.float32(65504)
BFLOAT16_MAX = np.uint32(0x7F7F0000).view(np.float32)
_BFLOAT16_NAN = np.uint16(0x7FC0)


class Float32Codec:
    """The bytes as they are."""

    def size(self, elements: int) -> int:
        """As in Codec."""
        return 4 * elements

    def encode(self, values: Float32, out: Bytes) -> None:
        """As in Codec."""
        out.view(np.float32)[:] = values

    def decode(self, encoded: Bytes, out: Float32) -> None:
        """As in Codec."""
        out[:] = encoded.view(np.float32)


class Float16Codec:
    """IEEE half precision, by the processor's or NumPy's own conversion."""

    def size(self, elements: int) -> int:
        """As in Codec."""
        return 2 * elements

    def encode(self, values: Float32, out: Bytes) -> None:
        """As in Codec."""
        halves = out.view(np.float16)
        with np.errstate(over="ignore", under="ignore"):
            halves[:] = _saturated(values, FLOAT16_MAX)

    def decode(self, encoded: Bytes, out: Float32) -> None:
        """As in Codec."""
        out[:] = encoded.view(np.float16)


class Bfloat16Codec:
    """The upper half of a float32, rounded by integer arithmetic: 8 GB/s encoding, where a package's type has 12.

    A float's bits, read as an integer, grow with its magnitude, and the 16 lower ones are what rounding drops: adding
    0x7FFF, and 1 more where the last bit kept is odd, carries into the upper half where nearest-even rounds up.
    """

    def __init__(self) -> None:
        self._sum = np.empty(BLOCK_ELEMENTS, np.uint32)

    def size(self, elements: int) -> int:
        """As in Codec."""
        return 2 * elements

    def encode(self, values: Float32, out: Bytes) -> None:
        """As in Codec."""
        bits = _saturated(values, BFLOAT16_MAX).view(np.uint32)
        rounded = self._sum[: len(values)]
        np.right_shift(bits, 16, out=rounded)
        np.bitwise_and(rounded, 1, out=rounded)
        np.add(rounded, bits, out=rounded)
        np.add(rounded, 0x7FFF, out=rounded)
        upper = out.view(np.uint16)
        upper[:] = rounded.view(np.uint16)[1::2]  # little-endian: the second half is the upper one
        if np.isnan(values.max(initial=0)):
            upper[np.isnan(values)] = _BFLOAT16_NAN  # the addition may carry a nan's fraction into the sign

    def decode(self, encoded: Bytes, out: Float32) -> None:
        """As in Codec."""
        np.left_shift(encoded.view(np.uint16), 16, out=out.view(np.uint32), dtype=np.uint32)


def _saturated(values: Float32, largest: np.float32) -> Float32:
    """The values, those that are finite and beyond `largest` at it; usually the same array."""
    if max(values.max(initial=0), -values.min(initial=0)) <= largest:  # false where there is a nan
        return values
    return np.where(np.isfinite(values), values.clip(-largest, largest), values)
