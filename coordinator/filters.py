"""Which jobs a list shows: the filter of ListJobs, read and turned into a condition on the tables.

Rules: the grammar is a small part of https://google.aip.dev/160, and all of it is here:

    filter: TERM { AND TERM }
    TERM:   state = RUNNING | owner = ada | labels.team != "vision" | priority >= 5

`=` and `!=` go with every field, `<`, `<=`, `>` and `>=` with priority. A value is a word, or any text in double quotes
with `\\"` and `\\\\` for those two characters. A job without a label has no value for it: `!=` finds it.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import sqlalchemy as sa

from coordinator import schema
from coordinator.jobs import JobState
from protos.labels import LABEL_RULE, is_label
from protos.wording import not_one_of, quoted

LONGEST = 2000  # characters
LABELS = "labels."
FIELDS = ("state", "owner", "priority")
COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_TERM = re.compile(
    r"""\s*(?P<field>[A-Za-z0-9._-]+)\s*(?P<sign>!=|<=|>=|=|<|>)\s*(?:"(?P<text>(?:[^"\\]|\\["\\])*)"|(?P<word>[^\s"]+))\s*"""
)


class FilterInvalid(Exception):
    """The filter is not of the grammar; the message says where and what is allowed."""


class Term(NamedTuple):
    field: str
    sign: str
    value: str | int


def read_filter(text: str) -> list[Term]:
    """The terms that all must hold; none for an empty filter. FilterInvalid."""
    if len(text) > LONGEST:
        raise FilterInvalid(f"is longer than {LONGEST} characters")
    terms: list[Term] = []
    place = 0
    while text[place:].strip():
        if terms:
            if (word := re.compile(r"AND\s").match(text, place)) is None:
                raise FilterInvalid(f"AND is expected at {quoted(text[place:])}")
            place = word.end()
        if (match := _TERM.match(text, place)) is None:
            raise FilterInvalid(f"a term such as state=RUNNING is expected at {quoted(text[place:])}")
        given = match["word"] if match["text"] is None else re.sub(r"\\(.)", r"\1", match["text"])
        terms.append(_term(match["field"], match["sign"], given))
        place = match.end()
    return terms


def condition_of(terms: list[Term]) -> sa.ColumnElement[bool] | None:
    """What a row of `jobs` must fulfil."""
    return sa.and_(*map(_condition, terms)) if terms else None


def _term(field: str, sign: str, value: str) -> Term:
    if field.startswith(LABELS):
        name = field.removeprefix(LABELS)
        if not is_label(name):
            raise FilterInvalid(f"{quoted(name)} is no label's name: {LABEL_RULE}")
    elif field not in FIELDS:
        raise FilterInvalid(f"field {not_one_of(field, (*FIELDS, LABELS + 'NAME'))}")
    if field == "priority":
        if not re.fullmatch(r"-?[0-9]{1,9}", value):
            raise FilterInvalid(f"priority: {quoted(value)} is not a whole number")
        return Term(field, sign, int(value))
    if sign not in ("=", "!="):
        raise FilterInvalid(f"{field} takes = and !=, not {sign}")
    if field == "state" and value not in list(JobState):
        raise FilterInvalid(f"state {not_one_of(value, list(JobState))}")
    return Term(field, sign, value.replace("\0", ""))


def _condition(term: Term) -> sa.ColumnElement[bool]:
    if not term.field.startswith(LABELS):
        condition: sa.ColumnElement[bool] = COMPARE[term.sign](schema.jobs.c[term.field], term.value)
        return condition
    labels = schema.labels.c
    named = sa.select(labels.job).where(labels.name == term.field.removeprefix(LABELS), labels.value == term.value)
    return schema.jobs.c.number.in_(named) if term.sign == "=" else schema.jobs.c.number.not_in(named)
