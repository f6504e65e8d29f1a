"""What several rounds come to: the median and the range, of figures and of ratios between neighbours in time.

Rules: pure. A ratio is taken within a round, where both sides met the same weather, and only then summed up over the
rounds; the ratio of two medians would lose that.
"""

import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """The middle and the range of the rounds' values."""

    median: float
    low: float
    high: float


def spread(values: Iterable[float]) -> Spread:
    """Median, minimum and maximum of at least one value."""
    values = list(values)
    if not values:
        raise ValueError("a spread needs at least one value")
    return Spread(statistics.median(values), min(values), max(values))


def ratio_spread(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """The spread of ours / theirs, round by round; both sides have a value for every round."""
    return spread(a / b for a, b in zip(ours, theirs, strict=True))


def epochs_for(seconds: float, samples_per_second: float, samples: int) -> int:
    """How many epochs of `samples` fill `seconds` at that rate, and one more, which is not timed; at least 2."""
    return 1 + max(1, round(seconds * samples_per_second / samples))
