"""Values and words as messages to people show them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable


def nearest(word: str, allowed: Iterable[str]) -> str | None:
    """The allowed word most like this one, or None where nothing is near."""
    return next(iter(difflib.get_close_matches(word, list(allowed), n=1)), None)


def not_one_of(word: str, allowed: Iterable[str], hint: str = "") -> str:
    """What to say of a word that is none of those allowed; the nearest of them where there is no better hint."""
    allowed = list(allowed)
    near = nearest(word, allowed)
    hint = hint or (f"did you mean {near}?" if near else "")
    return f"{quoted(word)} is not one of: {', '.join(allowed)}" + (f"; {hint}" if hint else "")


def quoted(text: str) -> str:
    """The text in quotes, on one line and short enough for a message."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def number(value: float) -> str:
    """A number as a person writes it: 2 for 2.0."""
    return str(int(value)) if math.isfinite(value) and value == int(value) and abs(value) < 1e15 else repr(value)
