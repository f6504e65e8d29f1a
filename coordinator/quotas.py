"""How much jobs may take: the limits a coordinator is started with, and what is said where one is reached.

Rules: a limit is a row of LIMITS and a field of Quotas; 0 means none. What a job is by itself is held against `job.*`
before it is taken, and so is the room in the queue. How large a model is depends on the data, which no coordinator
reads: `job.parameters` is held by the job's own workers, before they allocate the model. `running` and `user.running`
refuse nothing: a job beyond them waits and says so. A user is who submitted a job, by the name of a token; before there
is one, all are one.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from google.protobuf.message import Message

from coordinator.refusals import Refused
from protos import job_pb2
from protos.labels import is_map
from protos.rules import rule_of
from protos.urls import is_url


@dataclass(frozen=True)
class Quotas:
    """0 means no limit."""

    queue: int = 10_000
    running: int = 0
    user_queue: int = 0
    user_running: int = 0
    job_slots: int = 0
    job_data_bytes: int = 0
    job_parameters: int = 0


DEFAULT_QUOTAS = Quotas()


class Limit(NamedTuple):
    """What a limit counts, and what its user can do about it."""

    field: str
    counts: str
    remedy: str


LIMITS: Mapping[str, Limit] = MappingProxyType(
    {
        "queue": Limit("queue", "jobs that wait, of everybody", "submit it later, or cancel one that waits"),
        "running": Limit("running", "jobs launched at once", "it starts when one of them ends"),
        "user.queue": Limit("user_queue", "jobs of one user that wait", "submit it later, or cancel one that waits"),
        "user.running": Limit("user_running", "jobs of one user launched at once", "it starts when one of them ends"),
        "job.slots": Limit("job_slots", "slots a job takes", "ask for fewer workers"),
        "job.data_bytes": Limit(
            "job_data_bytes",
            "bytes of the local files a job names, as they lie on disk",
            "use smaller files",
        ),
        "job.parameters": Limit("job_parameters", "parameters of a model; a job with more fails", "make it smaller"),
    }
)


def read_quotas(settings: Sequence[str]) -> Quotas:
    """Quotas from `NAME=NUMBER` each. ValueError says what is wrong with which."""
    given: dict[str, int] = {}
    for setting in settings:
        name, _, number = setting.partition("=")
        if name not in LIMITS:
            raise ValueError(f"{setting!r}: there is no limit {name!r}; there are {', '.join(LIMITS)}")
        if not (number.isascii() and number.isdigit()):
            raise ValueError(f"{setting!r}: {number!r} is not a whole number from 0; 0 means no limit")
        given[LIMITS[name].field] = int(number)
    return dataclasses.replace(DEFAULT_QUOTAS, **given)


def check_job(spec: job_pb2.JobSpec, quotas: Quotas) -> None:
    """Refused where a job alone is beyond a limit."""
    _check(quotas, "job.slots", spec.workers, f"this job takes {spec.workers}")
    if quotas.job_data_bytes:
        size = sum(_file_sizes(spec))
        _check(quotas, "job.data_bytes", size, f"this job names {size}")


def check_queue(quotas: Quotas, waiting: int, waiting_of_user: int) -> None:
    """Refused where one more job would not find room among those that wait."""
    _check(quotas, "queue", waiting + 1, f"{waiting} wait")
    _check(quotas, "user.queue", waiting_of_user + 1, f"{waiting_of_user} of yours wait")


def reached(name: str, quotas: Quotas, count: int) -> str | None:
    """What a job is told that waits because of a limit, None where there is room for it."""
    limit = LIMITS[name]
    value: int = getattr(quotas, limit.field)
    return f"limit {name}={value} ({limit.counts}) is reached: {limit.remedy}" if value and count >= value else None


def _check(quotas: Quotas, name: str, wanted: int, found: str) -> None:
    limit = LIMITS[name]
    value: int = getattr(quotas, limit.field)
    if value and wanted > value:
        text = f"{found}, and the limit is {name}={value} ({limit.counts}): {limit.remedy}"
        raise Refused("LimitExceeded", text, quota=name)


def _file_sizes(message: Message) -> Iterator[int]:
    """Of the local files a message names; one that is not there is for the worker to complain of."""
    for field, value in message.ListFields():
        if field.message_type is not None and not is_map(field):
            for part in value if field.is_repeated else [value]:
                yield from _file_sizes(part)
        elif rule_of(field).path and not is_url(value):
            try:
                yield os.stat(Path(value)).st_size
            except OSError:
                continue
