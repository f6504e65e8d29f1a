"""Who starts, who waits and why, who has been launched for too long.

Rules: `decide` is a function of its arguments. Jobs stand in one order: higher priority first; within a priority the
owner who has the fewest slots, among equals who was served longest ago; an owner's own jobs as they were submitted. No
job overtakes another that could start, so that one that needs many slots gets them; passed over is only a job larger
than the whole coordinator, or one of a user who runs as many as allowed, because it would hold up everyone.
One slot a rank; the server of a parameter-server job takes none in this version, since it works while the ranks wait.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import groupby
from typing import NamedTuple

from coordinator.jobs import LAUNCHED, PAUSE_REQUESTED, PLACED, Job, JobState, is_held
from coordinator.quotas import DEFAULT_QUOTAS, Quotas, reached
from coordinator.recovery import launch_time


class Capacity(NamedTuple):
    """What there is to give."""

    slots: int
    start_deadline_seconds: float  # from launch to the first report
    quotas: Quotas = DEFAULT_QUOTAS


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
    """End it: it was launched and never reported, or runs for longer than it may."""

    job_id: str
    reason: str
    message: str


Action = Start | Wait | GiveUp


def decide(
    now: datetime, jobs: Sequence[Job], capacity: Capacity, served: Mapping[str, datetime] | None = None
) -> list[Action]:
    """One action for each job that is queued, past a deadline or due to be launched again.

    jobs: those that have not ended, in the order of submission. served: when a job of an owner was last launched.
    """
    actions: list[Action] = [late for job in jobs if (late := _late(now, job, capacity)) is not None]
    actions += _restarts(now, jobs, capacity)
    placed = [job for job in jobs if job.state in PLACED]
    free = capacity.slots - sum(job.slots for job in placed)
    running = Counter(job.owner for job in placed)
    waiting = 0
    held_up = False  # by a job that goes first and cannot start yet
    too_large: list[Job] = []
    for job in queue_order(jobs, served or {}):
        if job.slots > capacity.slots:
            too_large.append(job)
            continue
        own = reached("user.running", capacity.quotas, running[job.owner])
        whole = reached("running", capacity.quotas, running.total())
        if not (held_up or own or whole) and job.slots <= free:
            actions.append(Start(job.id))
            free -= job.slots
            running[job.owner] += 1
            continue
        ahead = f"; {_count(waiting, 'job')} ahead" if waiting else ""
        needs = f"needs {_count(job.slots, 'slot')}, {free} free"
        waiting += 1
        if own:
            actions.append(Wait(job.id, "UserRunningLimit", own, waiting))
            continue
        if whole:
            actions.append(Wait(job.id, "RunningLimit", whole + ahead, waiting))
        else:
            actions.append(Wait(job.id, "WaitingForTurn" if held_up else "WaitingForSlots", needs + ahead, waiting))
        held_up = True
    for job in too_large:
        waiting += 1
        has = f"this coordinator has {capacity.slots} in all"
        remedy = f"restart it with --slots {job.slots}, or cancel the job"
        message = f"needs {_count(job.slots, 'slot')}, {has}: {remedy}"
        actions.append(Wait(job.id, "TooFewSlots", message, waiting))
    return actions


def _restarts(now: datetime, jobs: Sequence[Job], capacity: Capacity) -> Iterator[Action]:
    """Jobs to be launched again have their slots, unless the coordinator came back with fewer."""
    used = sum(job.slots for job in jobs if job.state in LAUNCHED)
    for job in jobs:
        if job.state is not JobState.RESTARTING:
            continue
        if used + job.slots > capacity.slots:
            has = f"this coordinator has {capacity.slots} in all, {used} in use"
            yield Wait(
                job.id, "TooFewSlots", f"is to be launched again and needs {_count(job.slots, 'slot')}; {has}", 0
            )
            continue
        used += job.slots
        if launch_time(job) <= now:
            yield Start(job.id)


def queue_order(jobs: Sequence[Job], served: Mapping[str, datetime]) -> list[Job]:
    """The queued jobs, first to start first. A job's slots count as its owner's from its place on, as if it ran."""
    slots = Counter[str]()
    for job in jobs:
        if job.state in PLACED:
            slots[job.owner] += job.slots
    queued = [job for job in jobs if job.state is JobState.QUEUED]
    unserved_since = {job.owner: job.create_time for job in reversed(queued)} | dict(served)
    placed = Counter[str]()  # when an owner last got a place here, which is later than every time in `unserved_since`
    order: list[Job] = []
    for _, level in groupby(sorted(queued, key=_urgency), _urgency):
        lines: dict[str, deque[Job]] = {}  # in the order of each owner's first job
        for job in level:
            lines.setdefault(job.owner, deque()).append(job)
        while lines:
            owner = min(lines, key=lambda name: (slots[name], placed[name], unserved_since[name]))
            job = lines[owner].popleft()
            order.append(job)
            slots[owner] += job.slots
            placed[owner] = len(order)
            if not lines[owner]:
                del lines[owner]
    return order


def _urgency(job: Job) -> int:
    return -job.spec.priority


def _late(now: datetime, job: Job, capacity: Capacity) -> GiveUp | None:
    if job.state not in (JobState.STARTING, JobState.RUNNING):
        return None
    limit_seconds = job.spec.limits.seconds
    if limit_seconds and _ran_seconds(job, now) > limit_seconds:
        message = (
            f"stopped: it ran for longer than limits.seconds allows, {limit_seconds:g} s; what it left can be pulled"
        )
        return GiveUp(job.id, "DeadlineExceeded", message)
    waited_seconds = (now - job.state_time).total_seconds()
    if job.state is not JobState.STARTING or is_held(job.reason) or waited_seconds <= capacity.start_deadline_seconds:
        return None
    told = f"; {job.message}" if job.reason not in ("Launching", PAUSE_REQUESTED) else ""  # by who was to launch it
    message = (
        f"no rank reported within {capacity.start_deadline_seconds:g} s of the launch{told}; `paceline logs {job.id}` "
        "shows how far the ranks came"
    )
    return GiveUp(job.id, "StartDeadlineExceeded", message)


def _ran_seconds(job: Job, now: datetime) -> float:
    """How long it was launched, all its attempts together, without its stays in another system's queue."""
    ends = [*(change.time for change in job.history[1:]), now]
    stays = zip(job.history, ends, strict=True)
    return sum(
        (end - change.time).total_seconds()
        for change, end in stays
        if change.state in LAUNCHED and not is_held(change.reason)
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
