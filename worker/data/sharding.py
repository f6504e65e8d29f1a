"""Which samples a rank reads at a step: order, batch, share.

Rules: pure. The order is a function of (seed, epoch) alone and the batches of (order, batch size) alone, so every
number of ranks sees the same batches; a rank's share of a batch is a run of it. Each sample comes once an epoch, the
ragged last batch included. The order rests on PCG64's raw output and a sort, which are the same on every machine and
under every NumPy version; NumPy promises that of bit generators but not of `Generator.permutation` (NEP 19).
"""

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

# Streams of one seed that must not repeat each other.
EPOCH_ORDER = 0
HELD_OUT = 1
AUGMENTATION = 3  # 2 is that of dropout


def permutation(count: int, seed: int, *stream: int) -> NDArray[np.int64]:
    """0..count-1 in an order that (seed, stream) alone decides; int64 (count,).

    Random 64-bit keys are sorted, each with its own index in the lowest bits: the keys are then all different, so
    any sorting algorithm gives this one order, and the index is read back from the sorted key.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=stream)
    keys: NDArray[np.uint64] = np.random.PCG64(sequence).random_raw(count)
    index_bits = np.uint64((1 << max(0, count - 1).bit_length()) - 1)
    keys &= ~index_bits
    keys |= np.arange(count, dtype=np.uint64)
    keys.sort()
    keys &= index_bits
    return keys.view(np.int64)


def sample_order(seed: int, epoch: int, samples: int) -> NDArray[np.int64]:
    """The order in which `epoch` visits the samples: int64 (samples,), each index once."""
    return permutation(samples, seed, EPOCH_ORDER, epoch)


def steps_per_epoch(samples: int, batch_size: int) -> int:
    """Batches in an epoch, a ragged last one included; batch_size 0 means all samples in one."""
    return math.ceil(samples / batch_size) if batch_size else 1


def batch_bounds(step_in_epoch: int, samples: int, batch_size: int) -> tuple[int, int]:
    """The run [start, stop) of the order that step 0, 1, ... of an epoch trains on."""
    if not 0 <= step_in_epoch < steps_per_epoch(samples, batch_size):
        raise IndexError(f"step {step_in_epoch} of an epoch of {steps_per_epoch(samples, batch_size)} steps")
    start = step_in_epoch * batch_size
    return start, min(start + batch_size, samples) if batch_size else samples


def samples_of(ranks: Iterable[int], samples: int, world: int) -> int:
    """How many samples of a batch these ranks take."""
    return sum(stop - start for start, stop in (share(0, samples, rank, world) for rank in ranks))


def share(start: int, stop: int, rank: int, world: int) -> tuple[int, int]:
    """The run of [start, stop) that `rank` of `world` takes; sizes differ by at most 1, and some may be empty."""
    size = stop - start
    return start + size * rank // world, start + size * (rank + 1) // world
