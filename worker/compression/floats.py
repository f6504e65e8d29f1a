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
from numpy.typing import NDArray

from worker.compression.codec import BLOCK_ELEMENTS, Bytes, Float32

FLOAT16_MAX = np.float32(65504)
BIAS = np.uint32((127 - 15) << 23)  # of a float32's exponent over a half's
SMALLEST_NORMAL_HALF = np.uint32((127 - 14) << 23)  # 2^-14, as a float32's bits
HALF = np.uint32(126 << 23)  # 0.5, likewise
FLOAT32_INFINITY = np.uint32(0x7F800000)
HALF_INFINITY = np.uint32(0x7C00)
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
    """IEEE half precision by integer arithmetic: NumPy's own conversion takes 100 times as long below 6.1e-5, where
    it raises a flag for each element that underflows, and gradients are often as small.

    A magnitude's bits, less the difference of the exponents' biases and rounded as in Bfloat16Codec, are those of the
    half. Where that is subnormal it counts multiples of 2^-24, which is the last place of a float32 from 0.5 to 1:
    adding 0.5 rounds to them.
    """

    def __init__(self) -> None:
        self._signs = np.empty(BLOCK_ELEMENTS, np.uint32)
        self._magnitudes = np.empty(BLOCK_ELEMENTS, np.uint32)
        self._small = np.empty(BLOCK_ELEMENTS, np.float32)
        self._subnormal = np.empty(BLOCK_ELEMENTS, np.bool_)

    def size(self, elements: int) -> int:
        """As in Codec."""
        return 2 * elements

    def encode(self, values: Float32, out: Bytes) -> None:
        """As in Codec."""
        halves, values = out.view(np.uint16), _saturated(values, FLOAT16_MAX)
        signs, magnitudes, small, subnormal = self._scratch(len(values))
        np.bitwise_and(values.view(np.uint32), 0x7FFFFFFF, out=magnitudes)
        if magnitudes.max(initial=0) >= FLOAT32_INFINITY:
            halves.view(np.float16)[:] = values  # not finite: it matters no more how long it takes
            return
        np.less(magnitudes, SMALLEST_NORMAL_HALF, out=subnormal)
        np.add(magnitudes.view(np.float32), np.float32(0.5), out=small)
        np.right_shift(magnitudes, 13, out=signs)
        np.bitwise_and(signs, 1, out=signs)
        np.add(signs, magnitudes, out=signs)
        np.subtract(signs, BIAS - 0xFFF, out=signs)  # wraps around where the half is subnormal
        np.right_shift(signs, 13, out=magnitudes)
        np.subtract(small.view(np.uint32), HALF, out=signs)
        np.copyto(magnitudes, signs, where=subnormal)
        np.right_shift(values.view(np.uint32), 16, out=signs)
        np.bitwise_and(signs, 0x8000, out=signs)
        np.bitwise_or(magnitudes, signs, out=halves, casting="unsafe")

    def decode(self, encoded: Bytes, out: Float32) -> None:
        """As in Codec."""
        halves, bits = encoded.view(np.uint16), out.view(np.uint32)
        signs, magnitudes, small, subnormal = self._scratch(len(out))
        np.bitwise_and(halves, 0x7FFF, out=magnitudes, casting="unsafe")
        if magnitudes.max(initial=0) >= HALF_INFINITY:
            out[:] = encoded.view(np.float16)
            return
        np.less(magnitudes, 0x400, out=subnormal)
        np.bitwise_and(halves, 0x8000, out=signs, casting="unsafe")
        np.left_shift(signs, 16, out=signs)
        np.left_shift(magnitudes, 13, out=magnitudes)
        np.add(magnitudes, SMALLEST_NORMAL_HALF, out=small.view(np.uint32))
        np.subtract(small, SMALLEST_NORMAL_HALF.view(np.float32), out=small)
        np.add(magnitudes, BIAS, out=bits)
        np.copyto(out, small, where=subnormal)
        np.bitwise_or(bits, signs, out=bits)

    def _scratch(self, elements: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32], Float32, NDArray[np.bool_]]:
        return (
            self._signs[:elements],
            self._magnitudes[:elements],
            self._small[:elements],
            self._subnormal[:elements],
        )


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
