"""What a job must fulfil to be taken: the rules of the job file, and what this coordinator has and allows.

Rules: every fault is found at once, and each names its place in the job file; but of a job that is larger than a job
file can be that alone is said, at little cost. A path is judged by where it leads once
every link is followed; the same answer is given for a file that is not there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from google.protobuf.message import Message

from protos import job_pb2
from protos.job_text import MAX_DEPTH, MAX_VALUES
from protos.labels import is_map
from protos.rules import Violation, check, rule_of
from protos.urls import STORE_SCHEMES, is_in_store, is_under, is_url, shown

BYTES_AT_MOST = 256 * 1024  # twice what MAX_VALUES short values take


class NotAllowed(Violation):
    """What this coordinator does not allow, in a job that may be sound elsewhere."""


def violations_of(spec: job_pb2.JobSpec, data_roots: Sequence[Path | str], slots: int) -> list[Violation]:
    """Every reason not to take the job; `data_roots` are resolved paths and URLs; none means every place is allowed."""
    return [*check(spec), *_path_violations(spec, "", data_roots), *_slot_violations(spec, slots)]


def too_large(spec: job_pb2.JobSpec) -> list[Violation]:
    """Why the job is more than a job file can hold, which is what its workers read it from; empty where it is not."""
    if (size := spec.ByteSize()) > BYTES_AT_MOST:
        return [Violation("job file", f"takes {size} bytes, which is not at most {BYTES_AT_MOST}")]
    for count, depth in enumerate(_depths(spec, 1), start=1):
        if depth > MAX_DEPTH:
            return [Violation("job file", f"is nested more than {MAX_DEPTH} deep")]
        if count > MAX_VALUES:
            return [Violation("job file", f"holds more than {MAX_VALUES} values")]
    return []


def _depths(message: Message, depth: int) -> Iterator[int]:
    """How deep each value lies in the job's file: mappings, their keys, lists and scalars."""
    yield depth
    for field, value in message.ListFields():
        yield depth + 1
        if is_map(field):
            yield from [depth + 1] + [depth + 2] * (2 * len(value))
            continue
        if field.is_repeated:
            yield depth + 1
        inner = depth + 2 if field.is_repeated else depth + 1
        for part in value if field.is_repeated else [value]:
            if field.message_type is not None:
                yield from _depths(part, inner)
            else:
                yield inner


def _slot_violations(spec: job_pb2.JobSpec, slots: int) -> Iterator[Violation]:
    if spec.workers > slots:
        has = f"{spec.workers} is more than this coordinator's {slots} {'slot' if slots == 1 else 'slots'}"
        yield Violation("workers", f"{has}; start it with --slots {spec.workers} or ask for {slots} at most")


def _path_violations(message: Message, place: str, data_roots: Sequence[Path | str]) -> Iterator[Violation]:
    for field, value in message.ListFields():
        here = f"{place}.{field.name}" if place else field.name
        if is_map(field):
            continue
        if field.message_type is not None:
            parts = [(value, here)] if not field.is_repeated else [(v, f"{here}[{i}]") for i, v in enumerate(value)]
            for part, part_place in parts:
                yield from _path_violations(part, part_place, data_roots)
        elif rule_of(field).path and (fault := _path_fault(here, value, data_roots)):
            yield fault


def _path_fault(place: str, text: str, data_roots: Sequence[Path | str]) -> Violation | None:
    if is_url(text):
        return _url_fault(place, text, data_roots)
    path = Path(text)
    if "\0" in text:
        return Violation(place, f"{text!r} is not a path")
    if not path.is_absolute():
        unknown = f"{text!r} is not absolute: the coordinator does not know the folder it is meant from"
        return Violation(place, unknown)
    if not data_roots:
        return None
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as fault:  # a loop of links, a folder that may not be entered
        return Violation(place, f"{text!r} cannot be resolved: {fault}")
    if any(isinstance(root, Path) and real.is_relative_to(root) for root in data_roots):
        return None
    return _outside(place, text, data_roots)


def _url_fault(place: str, url: str, data_roots: Sequence[Path | str]) -> Violation | None:
    if not data_roots:
        return None if is_in_store(url) else _no_store(place, url)
    if any(isinstance(root, str) and is_under(url, root) for root in data_roots):
        return None
    return _outside(place, shown(url), data_roots)


def _no_store(place: str, url: str) -> Violation:
    allowed = f"{', '.join(STORE_SCHEMES)}, or what --data-root names"
    return NotAllowed(place, f"{shown(url)!r} is of no scheme that this coordinator lets jobs read from: {allowed}")


def _outside(place: str, text: str, data_roots: Sequence[Path | str]) -> Violation:
    allowed = ", ".join(map(str, data_roots))
    outside = f"{text!r} is not under a folder this coordinator may read from: {allowed} (set by --data-root)"
    return NotAllowed(place, outside)
