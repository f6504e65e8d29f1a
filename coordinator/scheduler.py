"""Who starts, who waits and why, who has been starting for too long.

Rules: `decide` is a function of its arguments. First come, first served, and no job overtakes another that fits; only a
job larger than the whole coordinator is passed over, because it would hold up everyone for ever.
One slot a rank; the server of a parameter-server job takes none in this version, since it works while the ranks wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from coordinator.jobs import LAUNCHED, Job, JobState


class Capacity(NamedTuple):
    """What there is to give."""

    slots: int
    start_deadline_seconds: float  # from launch to the first report


class Start(NamedTuple):
    """Launch it now."""

    job_id: str


class Wait(NamedTuple):
    """Leave it in the queue."""

    job_id: str
    reason: str
    message: str
    queue_position: int


class GiveUp(NamedTuple):
    """End it: it was launched and never reported."""

    job_id: str
    reason: str
    message: str


Action = Start | Wait | GiveUp


def decide(now: datetime, jobs: Sequence[Job], capacity: Capacity) -> list[Action]:
    """One action for each job that is queued, or starting past its deadline; `jobs` is in the order of submission."""
    actions: list[Action] = [late for job in jobs if (late := _late(now, job, capacity)) is not None]
    free = capacity.slots - sum(job.slots for job in jobs if job.state in LAUNCHED)
    queued = [job for job in jobs if job.state is JobState.QUEUED]
    waiting = 0
    for job in queued:
        if job.slots > capacity.slots:
            continue
        if waiting == 0 and job.slots <= free:
            actions.append(Start(job.id))
            free -= job.slots
            continue
        message = f"needs {_count(job.slots, 'slot')}, {free} free"
        if waiting:
            message += f"; {_count(waiting, 'job')} ahead"
        waiting += 1
        actions.append(Wait(job.id, "WaitingForTurn" if waiting > 1 else "WaitingForSlots", message, waiting))
    for job in queued:
        if job.slots > capacity.slots:
            waiting += 1
            has = f"this coordinator has {capacity.slots} in all"
            remedy = f"restart it with --slots {job.slots}, or cancel the job"
            message = f"needs {_count(job.slots, 'slot')}, {has}: {remedy}"
            actions.append(Wait(job.id, "TooFewSlots", message, waiting))
    return actions


def _late(now: datetime, job: Job, capacity: Capacity) -> GiveUp | None:
    waited_seconds = (now - job.state_time).total_seconds()
    if job.state is not JobState.STARTING or waited_seconds <= capacity.start_deadline_seconds:
        return None
    message = (
        f"no rank reported within {capacity.start_deadline_seconds:g} s of the launch; `paceline logs {job.id}` shows "
        "how far the ranks came"
    )
    return GiveUp(job.id, "StartDeadlineExceeded", message)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
