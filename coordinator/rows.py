"""A job as rows of the store, and back.

Rules: nothing is lost on the way but NUL characters in texts, which PostgreSQL cannot hold: they are spelled out.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from coordinator.jobs import Job, JobState, Process, StateChange
from protos import job_pb2

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def microseconds(time: datetime) -> int:
    return (time - _EPOCH) // _MICROSECOND


def time_of(microseconds: int) -> datetime:
    return _EPOCH + microseconds * _MICROSECOND


def fixed_columns(job: Job) -> dict[str, Any]:
    """The columns that a job is submitted with."""
    return {
        "id": job.id,
        "spec": job.spec.SerializeToString(deterministic=True),
        "owner": _text(job.owner),
        "priority": job.spec.priority,
    }


def changing_columns(job: Job) -> dict[str, Any]:
    """The columns of a job that change."""
    return {
        "state": job.state.value,
        "reason": _text(job.reason),
        "message": _text(job.message),
        "attempt": job.attempt,
        "queue_position": job.queue_position,
        "token_digest": job.token_digest,
        "pid": job.process.pid if job.process else None,
        "start_ticks": job.process.start_ticks if job.process else None,
        "summary": job.summary.SerializeToString(deterministic=True) if job.summary else None,
        "expires_microseconds": None if job.expires is None else microseconds(job.expires),
    }


def history_rows(number: int, history: Sequence[StateChange]) -> list[dict[str, Any]]:
    return [
        {
            "job": number,
            "place": place,
            "state": change.state.value,
            "reason": _text(change.reason),
            "message": _text(change.message),
            "time_microseconds": microseconds(change.time),
        }
        for place, change in enumerate(history)
    ]


def label_rows(number: int, job: Job) -> list[dict[str, Any]]:
    return [{"job": number, "name": name, "value": value} for name, value in job.spec.labels.items()]


def change_of(row: sa.Row[Any]) -> StateChange:
    return StateChange(JobState(row.state), row.reason, row.message, time_of(row.time_microseconds))


def job_of(row: sa.Row[Any], history: tuple[StateChange, ...]) -> Job:
    return Job(
        id=row.id,
        spec=job_pb2.JobSpec.FromString(row.spec),
        history=history,
        reason=row.reason,
        message=row.message,
        owner=row.owner,
        attempt=row.attempt,
        queue_position=row.queue_position,
        token_digest=row.token_digest,
        process=None if row.pid is None else Process(row.pid, row.start_ticks),
        summary=None if row.summary is None else job_pb2.Summary.FromString(row.summary),
    )


def _text(text: str) -> str:
    return text.replace("\0", "\\x00")
