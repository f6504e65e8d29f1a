"""What `paceline list` was asked for, as the filter that ListJobs takes (filters.py has its grammar)."""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.faults import CommandFault
from protos.exit_codes import ExitCode


def list_filter(state: str, labels: Sequence[str], owner: str, filter_text: str) -> str:
    """All of it, joined by AND; CommandFault for a label that is not NAME=VALUE."""
    terms = [filter_text] if filter_text.strip() else []
    if state:
        terms.append(f"state={_value(state.upper())}")
    for label in labels:
        name, equals, value = label.partition("=")
        if not (name and equals and value):
            raise CommandFault(f"--label: {label!r} is not NAME=VALUE, such as team=vision", ExitCode.USAGE)
        terms.append(f"labels.{name}={_value(value)}")
    if owner:
        terms.append(f"owner={_value(owner)}")
    return " AND ".join(terms)


def _value(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
