"""Bandwidths and durations as people write them, and as tables show them.

Rules: a unit is never guessed. `bit` and `B` differ by eight, prefixes are powers of ten, as on every network card.
"""

from __future__ import annotations

import re
from typing import Final

from worker.errors import UsageFault

PREFIXES: Final = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
BITS: Final = {"bit": 8.0, "bits": 8.0, "b": 8.0, "B": 1.0}  # how many make a byte
DURATIONS: Final = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}

_NUMBER = r"\s*(?P<number>\d+(?:\.\d*)?|\.\d+)\s*"
_BANDWIDTH = re.compile(_NUMBER + r"(?P<prefix>[kKMGT]?)(?P<unit>bits?|b|B)(?:/s|ps)?\s*")
_DURATION = re.compile(_NUMBER + r"(?P<unit>ns|us|ms|s)\s*")


def bytes_per_second(text: str) -> float:
    """What `100Mbit`, `1Gbit`, `10Gbit/s`, `25Gbps` or `12MB/s` carries.

    Raises:
        UsageFault: it is no bandwidth, has no unit, or is nothing at all.
    """
    found = _BANDWIDTH.fullmatch(text)
    if found is None and (bare := re.fullmatch(_NUMBER + "(?P<prefix>[kKMGT]?)", text)):
        written = text.strip() if bare["prefix"] else f"{text.strip()}M"
        raise UsageFault(f"--bandwidth: {text!r} lacks its unit; say {written}bit or {written}B/s")
    if found is None:
        raise UsageFault(f"--bandwidth: {text!r} is no bandwidth; say 100Mbit, 1Gbit, 10Gbit/s, 12MB/s or the like")
    given = float(found["number"]) * PREFIXES[found["prefix"]] / BITS[found["unit"]]
    if given <= 0:
        raise UsageFault(f"--bandwidth: {text!r} carries nothing; it must be above 0")
    return given


def seconds(text: str) -> float:
    """What `0.1ms`, `50us` or `0s` lasts.

    Raises:
        UsageFault: it is no duration, or has no unit.
    """
    found = _DURATION.fullmatch(text)
    if found is None:
        raise UsageFault(f"--latency: {text!r} is no time with a unit; say 0.1ms, 50us or the like")
    return float(found["number"]) * DURATIONS[found["unit"]]


def bandwidth_text(rate: float) -> str:
    """Of bytes a second, in bits: `100 Mbit/s`."""
    bits = 8 * rate
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if bits >= factor:
            return f"{bits / factor:.4g} {prefix}bit/s"
    return f"{bits:.4g} bit/s"


def seconds_text(duration: float) -> str:
    """`1.85 s`, `12.3 ms`, `45 us`: three digits, and 0 as it is."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if duration >= factor:
            return f"{_three_digits(duration / factor)} {unit}"
    return "0" if duration < 5e-8 else f"{duration / 1e-6:.1f} us"


def bytes_text(count: float) -> str:
    """`2.14 MB`, powers of ten."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{_three_digits(count / factor)} {unit}"
    return f"{count:.0f} B"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
