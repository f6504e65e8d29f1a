"""One bit for each element, with the mean magnitude of each sign for every ROW elements: 28.4 times less than float32.

x' = m+ where x >= 0, else -m-; m+ and m- are the means of |x| over the elements of each sign, which for given signs is
what loses least: |x - x'|^2 = |x|^2 - n+ m+^2 - n- m-^2 (Seide et al. 2014, whose columns are rows here). Since one of
the two is at least the mean over its sign, d >= 1/ROW in error feedback's condition. What two values make up, one of
each sign, decodes to itself.
"""

from __future__ import annotations

import numpy as np

from worker.compression.codec import BLOCK_ELEMENTS, Bytes, Float32, rows

ROW = 512  # elements that share two means, 8 bytes beside 64 of bits; 4096 learned the digits 4 points worse


class SignCodec:
    """[for each row, the bits of m+ and m- as float32][bits, the first element in the highest of the first byte]."""

    def __init__(self) -> None:
        self._magnitudes = np.empty(BLOCK_ELEMENTS, np.float32)
        self._positive = np.empty(BLOCK_ELEMENTS, np.bool_)

    def size(self, elements: int) -> int:
        """As in Codec."""
        return 8 * -(-elements // ROW) + -(-elements // 8)

    def encode(self, values: Float32, out: Bytes) -> None:
        """As in Codec."""
        means, bits = _split(out, len(values))
        positive, magnitudes = self._positive[: len(values)], self._magnitudes[: len(values)]
        np.greater_equal(values, 0, out=positive)
        first = 0
        # In float64 a block's sums are exact enough that equal values have their own value as mean.
        with np.errstate(invalid="ignore", over="ignore"):
            for x, p, m in zip(rows(values, ROW), rows(positive, ROW), rows(magnitudes, ROW), strict=True):
                counts = np.count_nonzero(p, axis=1)
                np.maximum(x, 0, out=m)
                above = m.sum(axis=1, dtype=np.float64)
                whole = x.sum(axis=1, dtype=np.float64)
                here = slice(first, first + len(x))
                means[here, 0] = above / np.maximum(counts, 1)
                means[here, 1] = (above - whole) / np.maximum(x.shape[1] - counts, 1)
                first += len(x)
        bits[:] = np.packbits(positive)

    def decode(self, encoded: Bytes, out: Float32) -> None:
        """As in Codec; a bit chooses between two bit patterns, which is exact and needs no branch."""
        means, bits = _split(encoded, len(out))
        chosen = out.view(np.uint32)
        chosen[:] = np.unpackbits(bits, count=len(out))
        above, below = means[:, 0].copy().view(np.uint32), (-means[:, 1]).view(np.uint32)
        first = 0
        for x in rows(chosen, ROW):
            here = slice(first, first + len(x))
            np.multiply(x, (above[here] ^ below[here])[:, None], out=x)
            np.bitwise_xor(x, below[here, None], out=x)
            first += len(x)


def _split(encoded: Bytes, elements: int) -> tuple[Float32, Bytes]:
    head = 8 * -(-elements // ROW)
    return encoded[:head].view(np.float32).reshape(-1, 2), encoded[head:]
