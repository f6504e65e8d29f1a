"""The elements of largest magnitude of every block, as indices and values; all others wait in the residual.

Of each block's n elements the k = ceil(fraction n) largest are sent: 6 bytes each, because an index within a block
takes 16 bits. So |x - x'|^2 <= (1 - k/n) |x|^2 for each block and the whole. Deep Gradient Compression (Lin et al.
2018) sends 0.1 % so, with momentum corrected and warmed up; here momentum is the optimizer's, behind the exchange.
Elements of equal magnitude: those that come first. What is sent is exact.
"""

from __future__ import annotations

import math

import numpy as np

from worker.compression.codec import BLOCK_ELEMENTS, Bytes, Float32

BYTES = 6  # of a value and its index


class TopKCodec:
    """[k values, float32][k indices, uint16, rising]."""

    def __init__(self, fraction: float) -> None:
        self._fraction = fraction
        self._magnitudes = np.empty(BLOCK_ELEMENTS, np.uint32)

    def size(self, elements: int) -> int:
        """As in Codec."""
        return BYTES * self._kept(elements)

    def encode(self, values: Float32, out: Bytes) -> None:
        """As in Codec.

        Magnitudes are compared as the integers of their bits, which are in the same order, infinities and nan last; and
        a partition is faster on them. It is slow where most are 0, as of what a server answers: those are left out.
        """
        kept = self._kept(len(values))
        magnitudes = self._magnitudes[: len(values)]
        np.bitwise_and(values.view(np.uint32), 0x7FFFFFFF, out=magnitudes)
        last = np.uint32(0)
        nonzero = int(np.count_nonzero(magnitudes))
        if nonzero > kept:
            among = magnitudes if 2 * nonzero > len(values) else magnitudes[magnitudes != 0]
            last = np.partition(among, len(among) - kept)[len(among) - kept]
        chosen = np.flatnonzero(magnitudes >= last)
        if len(chosen) > kept:
            equal = np.flatnonzero(magnitudes[chosen] == last)
            chosen = np.delete(chosen, equal[len(equal) - (len(chosen) - kept) :])
        out[: 4 * kept].view(np.float32)[:] = values[chosen]
        out[4 * kept :].view(np.uint16)[:] = chosen

    def decode(self, encoded: Bytes, out: Float32) -> None:
        """As in Codec. ValueError where an index lies outside the block, or does not follow those before."""
        kept = self._kept(len(out))
        indices = encoded[4 * kept :].view(np.uint16)
        if indices.max(initial=0) >= len(out):
            raise ValueError(f"index {indices.max()} lies outside a block of {len(out)}")
        falling = np.flatnonzero(indices[1:] <= indices[:-1])
        if len(falling):
            first = falling[0]
            raise ValueError(f"index {indices[first + 1]} follows {indices[first]}: they must rise")
        out[:] = 0
        out[indices] = encoded[: 4 * kept].view(np.float32)

    def _kept(self, elements: int) -> int:
        return min(elements, math.ceil(self._fraction * elements))
