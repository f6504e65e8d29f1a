"""Integers of 8 bits with a scale for every ROW elements: 3.98 times less than float32.

q = round(x / s), s = max|x| / 127 over the row, and x' = s q: |x - x'| <= s / 2, so that error is at most 0.4 % of the
row's largest value. QSGD (Alistarh et al. 2017) scales by the norm of a row and rounds at random to be unbiased; with
error feedback nearest rounding may be biased and loses less. A row smaller than 1e-36 is sent as zeros.
"""

from __future__ import annotations

import numpy as np

from worker.compression.codec import BLOCK_ELEMENTS, Bytes, Float32, rows

ROW = 1024  # elements that share a scale: its 4 bytes are 0.4 % of theirs
LEVELS = np.float32(127)
SMALLEST = np.float32(1e-36)  # of a row's largest value: its reciprocal is finite
LARGEST = np.float32(3.4e38)  # beyond it, 127 times the scale may round to infinity


class Int8Codec:
    """[scales, one float32 for each row][integers]."""

    def __init__(self) -> None:
        self._quotients = np.empty(BLOCK_ELEMENTS, np.float32)

    def size(self, elements: int) -> int:
        """As in Codec."""
        return 4 * -(-elements // ROW) + elements

    def encode(self, values: Float32, out: Bytes) -> None:
        """As in Codec."""
        scales, integers = _split(out, len(values))
        first = 0
        quotients = self._quotients[: len(values)]
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            for x, q, i in zip(rows(values, ROW), rows(quotients, ROW), rows(integers, ROW), strict=True):
                np.abs(x, out=q)
                largest = q.max(axis=1)
                largest[largest < SMALLEST] = 0
                largest[(largest > LARGEST) & (largest < np.inf)] = LARGEST
                inverse = np.where(largest == 0, np.float32(0), LEVELS / largest)
                np.multiply(x, inverse[:, None], out=q)
                np.rint(q, out=q)
                np.copyto(i, q, casting="unsafe")
                scales[first : first + len(x)] = largest / LEVELS
                first += len(x)

    def decode(self, encoded: Bytes, out: Float32) -> None:
        """As in Codec."""
        scales, integers = _split(encoded, len(out))
        first = 0
        with np.errstate(invalid="ignore"):
            for x, i in zip(rows(out, ROW), rows(integers, ROW), strict=True):
                np.multiply(i, scales[first : first + len(x), None], out=x)
                first += len(x)


def _split(encoded: Bytes, elements: int) -> tuple[Float32, np.ndarray]:
    head = 4 * -(-elements // ROW)
    return encoded[:head].view(np.float32), encoded[head:].view(np.int8)
