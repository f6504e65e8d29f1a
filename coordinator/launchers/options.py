"""What `paceline serve --launcher NAME --launcher-option NAME=VALUE ...` says, read into names and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class OptionInvalid(ValueError):
    """An option of a launcher cannot be used; the message says which, and what can."""


def read(launcher: str, known: Mapping[str, str], texts: Sequence[str]) -> dict[str, str]:
    """The values by name, raising OptionInvalid. known: the names this launcher takes, and what each is for."""
    values: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if name not in known:
            takes = "; ".join(f"{each} ({meaning})" for each, meaning in known.items()) or "none"
            raise OptionInvalid(f"{text}: --launcher {launcher} takes {takes}")
        if not equals or not value:
            raise OptionInvalid(f"{text}: write it {name}=VALUE")
        if name in values:
            raise OptionInvalid(f"{text}: {name} is given twice")
        values[name] = value
    return values
