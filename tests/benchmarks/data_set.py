"""What every contender trains on: made up, seeded, easy enough that a loss above chance means a broken run."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.benchmarks.cases import CONTEXT, Case

IMAGE_SHAPE = (28, 28)
CLASSES = 10
WORDS = 64


class Images(NamedTuple):
    """Where the arrays are."""

    features: Path  # .npy, uint8 (n, 28, 28)
    labels: Path  # .npy, int64 (n,)

    def for_job(self) -> dict[str, Any]:
        """`data` of a job file."""
        train = {"npy": {"features": str(self.features), "targets": str(self.labels)}}
        return {"train": train, "scale": 1 / 255}

    def for_peer(self) -> tuple[str, ...]:
        return "--features", str(self.features), "--labels", str(self.labels)


class Text(NamedTuple):
    """Where the text is, and how many bytes of it are a sample."""

    path: Path
    context: int

    def for_job(self) -> dict[str, Any]:
        """`data` of a job file."""
        return {"train": {"text": {"path": str(self.path), "context": self.context}}}

    def for_peer(self) -> tuple[str, ...]:
        return "--text", str(self.path), "--context", str(self.context)


Data = Images | Text


def make_images(samples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Each image is the mean of its class's random prototype and of noise of its own."""
    generator = np.random.default_rng(seed)
    prototypes = generator.integers(0, 256, (CLASSES, *IMAGE_SHAPE), dtype=np.uint8)
    labels = generator.integers(0, CLASSES, samples, dtype=np.int64)
    images = generator.integers(0, 256, (samples, *IMAGE_SHAPE), dtype=np.uint8)
    images >>= 1
    images += prototypes[labels] >> 1
    return images, labels


def make_text(size: int, seed: int = 0) -> bytes:
    """So many bytes of words drawn from a made-up vocabulary, with a blank behind each."""
    generator = np.random.default_rng(seed)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
    words = [generator.choice(letters, length).tobytes() for length in generator.integers(2, 9, WORDS)]
    drawn = generator.integers(0, WORDS, size // 3 + 1)  # the shortest word and its blank are three bytes
    return b"".join(words[index] + b" " for index in drawn)[:size]


def write_data(folder: Path, case: Case) -> Data:
    """The data of a case; cases of as many samples of a kind share it."""
    if case.of_text:
        text = Text(folder / f"text-{case.samples}", CONTEXT)
        text.path.write_bytes(make_text(case.samples * CONTEXT + 1))  # the last byte is only a target
        return text
    files = Images(folder / f"features-{case.samples}.npy", folder / f"labels-{case.samples}.npy")
    images, labels = make_images(case.samples)
    np.save(files.features, images)
    np.save(files.labels, labels)
    return files
