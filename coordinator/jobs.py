"""A job, its states, and the moves between them.

Rules: every move is in TRANSITIONS; `advance` is the only way from one job to the next; an illegal move raises and
changes nothing. Nothing here reads a clock, a file or a socket.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple

from protos import job_pb2


class JobState(StrEnum):
    """As the contract words them; the proto names carry the prefix JOB_STATE_."""

    QUEUED = "QUEUED"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    RESTARTING = "RESTARTING"
    CANCELLING = "CANCELLING"
    CANCELLED = "CANCELLED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"


LAUNCHED = frozenset({JobState.STARTING, JobState.RUNNING, JobState.CANCELLING})  # these have processes
PLACED = LAUNCHED | {JobState.RESTARTING}  # these hold their slots
PAUSE_REQUESTED = "PauseRequested"
HELD = "Held"  # begins the reason of a launched job that waits in the queue of another system, such as HeldForResources
ENDED = frozenset({JobState.CANCELLED, JobState.SUCCEEDED, JobState.FAILED})


class StateChange(NamedTuple):
    """One entry into a state."""

    state: JobState
    reason: str  # one CamelCase word for programs
    message: str  # one sentence for people
    time: datetime


class Process(NamedTuple):
    """The launcher of a job. A pid alone may be taken by another process later; with its start time it names one."""

    pid: int
    start_ticks: int  # field 22 of /proc/PID/stat


@dataclass(frozen=True)
class Job:
    """What a person submitted and what became of it. The messages inside are values: nobody writes to them."""

    id: str
    spec: job_pb2.JobSpec  # as resolved, every default written in
    history: tuple[StateChange, ...]  # never empty, oldest first
    reason: str
    message: str
    owner: str = ""  # who submitted it; empty where callers are not asked who they are
    attempt: int = 0  # launches so far
    queue_position: int = 0  # 1 for the next to start, 0 when it does not wait
    token_digest: str | None = None
    process: Process | None = None
    summary: job_pb2.Summary | None = None

    @property
    def state(self) -> JobState:
        return self.history[-1].state

    @property
    def state_time(self) -> datetime:
        return self.history[-1].time

    @property
    def create_time(self) -> datetime:
        return self.history[0].time

    @property
    def slots(self) -> int:
        """One a rank. The server of a parameter-server job takes none in this version: it works while ranks wait."""
        return self.spec.workers

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def pausing(self) -> bool:
        """Whether its ranks are to leave: the contract has no state for it, so the reason tells."""
        return self.state in LAUNCHED and self.reason == PAUSE_REQUESTED

    @property
    def expires(self) -> datetime | None:
        """When the files of an ended job are removed; None while it has not ended, or where they are kept."""
        keep_seconds = self.spec.limits.keep_for
        return self.state_time + timedelta(seconds=keep_seconds) if self.ended and keep_seconds else None


# ------------------------------------------------------------------------------------------------------------- events


class Waited(NamedTuple):
    """The scheduler passed it over, and why."""

    reason: str
    message: str
    queue_position: int


class Admitted(NamedTuple):
    """It has its slots and is about to be launched under this token."""

    token_digest: str


class Launched(NamedTuple):
    """The launcher runs, as a process of this machine."""

    process: Process


class Observed(NamedTuple):
    """The system that was given the launch says how far it is with it."""

    reason: str
    message: str


class Reported(NamedTuple):
    """A rank of this attempt reported for the first time."""


class Finished(NamedTuple):
    """Every rank ended well and left a summary."""

    summary: job_pb2.Summary


class Broke(NamedTuple):
    """It could not be launched, a rank failed, or nobody can answer for its processes."""

    reason: str
    message: str


class Lost(NamedTuple):
    """Its processes are gone and that is not its own fault: it is to be launched again."""

    reason: str
    message: str


class PauseAsked(NamedTuple):
    """A person wants its slots back for a while."""


class Paused(NamedTuple):
    """The processes of a job that was to pause are gone."""

    message: str


class ResumeAsked(NamedTuple):
    """A person wants it to go on."""


class CancelAsked(NamedTuple):
    """A person wants it stopped."""


class Stopped(NamedTuple):
    """The processes of a cancelled job are gone."""

    message: str


Event = (
    Waited
    | Admitted
    | Launched
    | Observed
    | Reported
    | Finished
    | Broke
    | Lost
    | PauseAsked
    | Paused
    | ResumeAsked
    | CancelAsked
    | Stopped
)

TRANSITIONS: Mapping[JobState, Mapping[type, JobState]] = MappingProxyType(
    {
        JobState.QUEUED: {
            Waited: JobState.QUEUED,
            Admitted: JobState.STARTING,
            PauseAsked: JobState.PAUSED,
            CancelAsked: JobState.CANCELLED,
        },
        JobState.STARTING: {
            Launched: JobState.STARTING,
            Observed: JobState.STARTING,
            Reported: JobState.RUNNING,
            Finished: JobState.SUCCEEDED,  # a job so short that its end was seen before its first report
            Broke: JobState.FAILED,
            Lost: JobState.RESTARTING,
            PauseAsked: JobState.STARTING,
            Paused: JobState.PAUSED,
            CancelAsked: JobState.CANCELLING,
        },
        JobState.RUNNING: {
            Finished: JobState.SUCCEEDED,
            Broke: JobState.FAILED,
            Lost: JobState.RESTARTING,
            PauseAsked: JobState.RUNNING,
            Paused: JobState.PAUSED,
            CancelAsked: JobState.CANCELLING,
        },
        JobState.RESTARTING: {
            Waited: JobState.RESTARTING,
            Admitted: JobState.STARTING,
            PauseAsked: JobState.PAUSED,
            CancelAsked: JobState.CANCELLED,
        },
        JobState.PAUSED: {
            PauseAsked: JobState.PAUSED,
            ResumeAsked: JobState.QUEUED,
            CancelAsked: JobState.CANCELLED,
        },
        JobState.CANCELLING: {
            CancelAsked: JobState.CANCELLING,
            Stopped: JobState.CANCELLED,
        },
        JobState.CANCELLED: {},
        JobState.SUCCEEDED: {},
        JobState.FAILED: {},
    }
)


class IllegalMove(Exception):
    """The job's state does not allow the event."""

    def __init__(self, job: Job, event: Event) -> None:
        super().__init__(f"job {job.id} is {job.state}: {type(event).__name__} is not possible now")


def submitted(job_id: str, spec: job_pb2.JobSpec, now: datetime, owner: str = "") -> Job:
    """A new job."""
    change = StateChange(JobState.QUEUED, "Submitted", "accepted; the scheduler has not looked at it yet", now)
    return Job(job_id, spec, (change,), change.reason, change.message, owner)


def advance(job: Job, event: Event, now: datetime) -> Job:
    """The job after the event; raises IllegalMove.

    History grows only when a state is entered anew, or when the queue of another system takes or lets go of a launch.
    """
    state = TRANSITIONS[job.state].get(type(event))
    if state is None:
        raise IllegalMove(job, event)
    reason, message = job.reason, job.message
    match event:
        case Waited(reason, message, position):
            return replace(job, reason=reason, message=message, queue_position=position)
        case Launched(process):
            return replace(job, process=process)
        case Admitted(digest):
            job = replace(job, attempt=job.attempt + 1, token_digest=digest, queue_position=0)
            reason, message = "Launching", f"launching {job.slots} {'rank' if job.slots == 1 else 'ranks'}"
            if job.attempt > 1:
                message += f", attempt {job.attempt}"
        case Observed(reason, message):
            if job.pausing:
                return job
            if is_held(reason) == is_held(job.reason):
                return replace(job, reason=reason, message=message)
        case Reported():
            if not job.pausing:
                reason, message = "Training", "the ranks report progress"
        case Finished(summary):
            job = replace(job, summary=summary)
            reason, message = "Finished", f"every rank finished; {summary.steps} steps"
        case Broke(reason, message) | Lost(reason, message):
            pass
        case PauseAsked():
            if job.pausing or job.state is JobState.PAUSED:
                return job
            reason, message = PAUSE_REQUESTED, "pause was asked for; its ranks write a checkpoint and leave"
            if state is job.state:
                return replace(job, reason=reason, message=message)
            message = (
                f"paused {'before it started' if not job.attempt else 'while no rank of it ran'}; resume queues it"
            )
        case Paused(message):
            reason = PAUSE_REQUESTED
        case ResumeAsked():
            reason, message = "ResumeRequested", "resumed; the scheduler has not looked at it yet"
        case CancelAsked():
            if state is job.state:
                return job
            reason, message = "CancelRequested", "cancel was asked for; its ranks are being stopped"
            if state is JobState.CANCELLED:
                message = f"cancelled {'while no rank of it ran' if job.attempt else 'before it started'}"
        case Stopped(message):
            reason = "CancelRequested"
    if state not in LAUNCHED:  # the token dies with its attempt
        job = replace(job, token_digest=None, process=None, queue_position=0)
    change = StateChange(state, reason, message, now)
    return replace(job, history=(*job.history, change), reason=reason, message=message)


def is_held(reason: str) -> bool:
    """Whether a launched job of this reason has no processes yet: another system's queue has it."""
    return reason.startswith(HELD)


# ---------------------------------------------------------------------------------------------------------------- ids

_ID = re.compile(r"[a-z0-9]([a-z0-9-]{0,46}[a-z0-9])?")
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no letter is taken for a digit


def new_id(name: str) -> str:
    """A job's id: its name as a slug, then 30 random bits, such as `fashion-mlp-7f3k2q`."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower())[:40].strip("-") or "job"
    return f"{slug}-{''.join(secrets.choice(_ALPHABET) for _ in range(6))}"


def is_id(text: str) -> bool:
    """Whether the text may be a job's id: safe as a folder's name and as a label."""
    return _ID.fullmatch(text) is not None
