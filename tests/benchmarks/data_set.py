"""The images every contender trains on: made up, seeded, easy enough that a loss above chance means a broken run."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

IMAGE_SHAPE = (28, 28)
CLASSES = 10


class DataFiles(NamedTuple):
    """Where the arrays are."""

    features: Path  # uint8 (n, 28, 28)
    labels: Path  # int64 (n,)


def make_images(samples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Each image is the mean of its class's random prototype and of noise of its own."""
    generator = np.random.default_rng(seed)
    prototypes = generator.integers(0, 256, (CLASSES, *IMAGE_SHAPE), dtype=np.uint8)
    labels = generator.integers(0, CLASSES, samples, dtype=np.int64)
    images = generator.integers(0, 256, (samples, *IMAGE_SHAPE), dtype=np.uint8)
    images >>= 1
    images += prototypes[labels] >> 1
    return images, labels


def write_images(folder: Path, samples: int) -> DataFiles:
    files = DataFiles(folder / f"features-{samples}.npy", folder / f"labels-{samples}.npy")
    images, labels = make_images(samples)
    np.save(files.features, images)
    np.save(files.labels, labels)
    return files
