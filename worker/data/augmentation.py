"""Training images changed a little each epoch: flipped, shifted, cropped after padding.

Rules: what happens to a sample is a function of (seed, epoch, index in the training set) alone, so every number of
ranks, every micro-batch and a resumed run see the same images. Images are changed in their stored type, before any
preprocessing: a padded pixel is a stored 0. In the order flip, shift, crop; a block that stays in cache at a time.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import DTypeLike, NDArray

from protos import job_pb2
from worker.data.sharding import AUGMENTATION
from worker.errors import DataFault

BLOCK_BYTES = 1 << 16  # of images changed at once; from 128 KB on, the C library asks the system for every temporary
SHORT_PIXEL = 8  # channels
WORDS = 3  # random 64-bit words of a sample: two flips, two shifts, two crops


class Moves(NamedTuple):
    """What happens to each of n samples; (n,) each. Offsets are pixels, 0 to 2 reach, and `reach` moves nothing."""

    flip_rows: NDArray[np.bool_]  # upside down
    flip_columns: NDArray[np.bool_]  # left to right
    shift_rows: NDArray[np.int64]
    shift_columns: NDArray[np.int64]
    crop_rows: NDArray[np.int64]
    crop_columns: NDArray[np.int64]


class Augmentation(NamedTuple):
    """What a job asks to be done to its training images; `seed` is the job's."""

    seed: int
    flip_rows: bool = False
    flip_columns: bool = False
    shift: int = 0  # pixels
    crop: int = 0  # pixels

    def moves(self, epoch: int, indices: NDArray[np.int64]) -> Moves:
        """The moves of the samples at `indices` of the training set in `epoch`."""
        flips, shifts, crops = _random_words(self.seed, epoch, indices)
        return Moves(
            (flips >> np.uint64(63)).astype(np.bool_) & self.flip_rows,
            (flips >> np.uint64(62) & np.uint64(1)).astype(np.bool_) & self.flip_columns,
            *_two_offsets(shifts, self.shift),
            *_two_offsets(crops, self.crop),
        )


def make_augmentation(data: job_pb2.Data, seed: int, sample_shape: tuple[int, ...], place: str) -> Augmentation | None:
    """What the job asks for, or None where that is nothing; DataFault where the samples cannot take it."""
    augment = data.augment
    rows, columns = FLIPS[augment.flip or "none"]
    what = Augmentation(seed, rows, columns, augment.shift, augment.crop)
    if what == Augmentation(seed):
        return None
    if len(sample_shape) not in (2, 3):
        raise DataFault(
            f"{place}: data.augment changes images, but samples have shape {sample_shape}; "
            "remove it or give samples (height, width) or (height, width, channels)"
        )
    height, width = sample_shape[:2]
    for name in ("shift", "crop"):
        pixels = getattr(what, name)
        if pixels >= min(height, width):
            raise DataFault(
                f"{place}: data.augment.{name}: {pixels} pixels can leave nothing of an image of {height} x {width}; "
                f"ask for {min(height, width) - 1} at most"
            )
    return what


FLIPS = {  # the word of the job file -> (rows, columns)
    "none": (False, False),
    "horizontal": (False, True),
    "vertical": (True, False),
    "horizontal_and_vertical": (True, True),
}


class Augmenter:
    """Applies an augmentation to images (n, height, width) or (n, height, width, channels) of one shape and type."""

    def __init__(self, what: Augmentation, image_shape: tuple[int, ...], stored: DTypeLike) -> None:
        height, width, channels = (*image_shape, 1)[:3]
        self._what = what
        self._shape = height, width, channels
        image_bytes = height * width * channels * np.dtype(stored).itemsize
        self._block = max(1, BLOCK_BYTES // image_bytes)
        self._shifted = _Padded(self._block, self._shape, what.shift, stored) if what.shift else None
        self._cropped = _Padded(self._block, self._shape, what.crop, stored) if what.crop else None

    def apply(self, images: NDArray[Any], epoch: int, indices: NDArray[np.int64]) -> None:
        """Change the images, those at `indices` of the training set, in place; C-contiguous."""
        moves = self._what.moves(epoch, indices)
        samples = images.reshape(len(images), *self._shape)
        for start in range(0, len(images), self._block):
            run = slice(start, start + self._block)
            block = samples[run]
            if self._what.flip_rows:
                chosen = np.flatnonzero(moves.flip_rows[run])
                block[chosen] = block[chosen, ::-1]
            if self._what.flip_columns:
                chosen = np.flatnonzero(moves.flip_columns[run])
                block[chosen] = _mirrored(block[chosen])
            if self._shifted:
                self._shifted.put(block)
                self._shifted.repeat_edges(len(block))
                self._shifted.cut(block, moves.shift_rows[run], moves.shift_columns[run])
            if self._cropped:
                self._cropped.put(block)
                self._cropped.cut(block, moves.crop_rows[run], moves.crop_columns[run])


class _Padded:
    """Images with a margin around each, zeros at first, and every window of the images' size in it."""

    def __init__(self, capacity: int, shape: tuple[int, int, int], margin: int, stored: DTypeLike) -> None:
        height, width, channels = shape
        self._margin = margin
        self._images = np.zeros((capacity, height + 2 * margin, width + 2 * margin, channels), stored)
        self._inside = self._images[:, margin : margin + height, margin : margin + width]
        image, row, pixel, value = self._images.strides
        # [n, top, left] is a window (height, width x channels): a row of it is one run of memory.
        self._windows = as_strided(
            self._images,
            (capacity, 2 * margin + 1, 2 * margin + 1, height, width * channels),
            (image, row, pixel, row, value),
            writeable=False,
        )
        self._numbers = np.arange(capacity)

    def put(self, images: NDArray[Any]) -> None:
        self._inside[: len(images)] = images

    def repeat_edges(self, count: int) -> None:
        images, margin = self._images[:count], self._margin
        images[:, :, :margin] = images[:, :, margin : margin + 1]
        images[:, :, -margin:] = images[:, :, -margin - 1 : -margin]
        images[:, :margin] = images[:, margin : margin + 1]
        images[:, -margin:] = images[:, -margin - 1 : -margin]

    def cut(self, out: NDArray[Any], tops: NDArray[np.int64], lefts: NDArray[np.int64]) -> None:
        count, height = out.shape[:2]
        out.reshape(count, height, -1)[...] = self._windows[self._numbers[:count], tops, lefts]


def _mirrored(images: NDArray[Any]) -> NDArray[Any]:
    """Left to right. A channel at a time where pixels are short: NumPy turns pixels of 3 bytes round 4 times slower."""
    channels = images.shape[-1]
    if channels >= SHORT_PIXEL:
        return images[:, :, ::-1]
    mirrored = np.empty_like(images)
    for channel in range(channels):
        mirrored[..., channel] = images[:, :, ::-1, channel]
    return mirrored


def _two_offsets(words: NDArray[np.uint64], reach: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """From each word two of 0..2 reach: 32 bits are a fraction, so all are as likely to 1 in 10^5."""
    places = np.uint64(2 * reach + 1)
    high, low = words >> np.uint64(32), words & np.uint64(0xFFFFFFFF)
    return (high * places >> np.uint64(32)).view(np.int64), (low * places >> np.uint64(32)).view(np.int64)


def _random_words(seed: int, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.uint64]:
    """(WORDS, n): random bits for each sample, the outputs of SplitMix64 at the sample's places in the epoch's stream.

    SplitMix64 (G. Steele, D. Lea, C. Flood: Fast splittable pseudorandom number generators, OOPSLA 2014) reaches any
    place of its stream in one step, which a generator with a state does not. Whole-number arithmetic alone: the same
    bits on every machine and under every NumPy version.
    """
    start = np.random.SeedSequence(seed, spawn_key=(AUGMENTATION, epoch)).generate_state(1, np.uint64)
    places = indices.astype(np.uint64) * np.uint64(WORDS) + np.arange(1, WORDS + 1, dtype=np.uint64)[:, np.newaxis]
    bits: NDArray[np.uint64] = places * np.uint64(0x9E3779B97F4A7C15) + start
    bits ^= bits >> np.uint64(30)
    bits *= np.uint64(0xBF58476D1CE4E5B9)
    bits ^= bits >> np.uint64(27)
    bits *= np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    return bits
