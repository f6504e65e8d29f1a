"""The networks that are timed: the three of the design's tables, dense with ReLU, Adam and softmax cross-entropy."""

from typing import NamedTuple

LEARNING_RATE = 0.001


class Case(NamedTuple):
    """One network and how it is fed."""

    name: str
    units: tuple[int, ...]  # features, hidden layers, classes
    batch_size: int  # samples a rank takes in a step: two ranks take twice as many together
    samples: int  # in an epoch; a multiple of every global batch, so that no step is ragged

    @property
    def title(self) -> str:
        return f"{'-'.join(map(str, self.units))}, batch {self.batch_size} a rank"

    def shortened(self) -> "Case":
        """The same with an epoch of eight steps of two ranks, for a smoke run."""
        return self._replace(samples=16 * self.batch_size)


CASES = (
    Case("small", (784, 128, 10), 32, 16_384),
    Case("medium", (784, 512, 256, 10), 128, 16_384),
    Case("large", (784, 2048, 2048, 10), 256, 4_096),
)
