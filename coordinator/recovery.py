"""Which lost launches are tried again, how often, and after what pause.

Rules: pure; the job's history is all that is remembered. Tried again is what may go well another time: a process that
was killed or fell silent. What a rank says of its own fault (a loss that is not finite, a bad file, no memory) a person
has to put right. An end that a coordinator's own death or stop brought about counts against nobody.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime, timedelta
from types import MappingProxyType

from coordinator.jobs import Broke, Job, JobState, Lost, StateChange
from protos.exit_codes import ExitCode

# Whether a launch that ended for this reason (launchers.causes) is tried again.
RETRIED: Mapping[str, bool] = MappingProxyType(
    {
        "RankKilled": True,  # by the kernel short of memory, an operator, a fault of the machine
        "RankExited": True,  # without a word; but see FINAL_CODES
        "RankAborted": True,
        "RankFailed": False,  # what a rank says of itself; but see OF_ANOTHER
        "RanksFailed": False,
        "LauncherKilled": True,
        "LaunchFailed": True,  # mpirun ended and nobody said why
        "Interrupted": True,  # somebody told a rank to end, as the system does when it goes down
        "NodeFailed": True,  # Slurm's and Kubernetes' word for a machine that is gone
        "Preempted": True,
        "TimeLimitReached": True,  # of the system that ran it: goes on in another turn
        "Forgotten": True,  # the system no longer knows it, and nobody wrote down how it ended
        "OutOfMemory": False,
        "CancelledElsewhere": False,  # by somebody who had a right to
        "SubmitRefused": False,
        "HostUnreachable": True,
        "HostLost": True,
        "NotEnoughSlots": False,
        "WorkerMissing": False,
        "RootRefused": False,
        "NoSummary": False,
        "ProcessesRemain": False,  # what is left might still write into the folder
    }
)
FINAL_CODES = (ExitCode.USAGE, ExitCode.NOT_ALLOWED)
# A rank's word about another that is gone or stands still (worker/sync/heartbeats.py, worker/watchdog.py).
OF_ANOTHER = re.compile(r": (gone in|no progress for) ")

# Seconds before the next launch, after so many that were lost one soon after the other.
PAUSES = (0.0, 0.0, 1.0, 2.0, 5.0, 15.0, 60.0)
SOON = timedelta(seconds=10)  # after its launch

# Why a job is RESTARTING when it is the coordinator that was gone.
COORDINATOR_RESTARTED, COORDINATOR_STOPPED = "CoordinatorRestarted", "CoordinatorStopped"
NOBODYS_FAULT = (COORDINATOR_RESTARTED, COORDINATOR_STOPPED)


def after_loss(job: Job, reason: str, message: str, exit_code: int | None = None) -> Lost | Broke:
    """What becomes of a job whose launch ended badly. Further lines of the message are the last ones of its logs."""
    retries = job.spec.limits.retries
    if not retries or not is_retried(reason, message, exit_code):
        return Broke(reason, message)
    first, newline, last_lines = message.partition("\n")
    done = restarts(job)
    if done >= retries:
        return Broke(reason, f"{first}; launched {job.attempt} times, limits.retries is {retries}{newline}{last_lines}")
    if _failed_alike_at_once(job, reason, first):
        return Broke(reason, f"{first}; twice in the same way before its first step{newline}{last_lines}")
    which = f"retry {done + 1} of {retries}"
    return Lost(reason, f"{first}; goes on from its newest checkpoint ({which}){newline}{last_lines}")


def is_retried(reason: str, message: str, exit_code: int | None) -> bool:
    if reason in ("RankFailed", "RanksFailed") and OF_ANOTHER.search(message.partition("\n")[0]):
        return True
    return RETRIED[reason] and exit_code not in FINAL_CODES


def restarts(job: Job) -> int:
    """How many of its retries a job has used."""
    return sum(change.state is JobState.RESTARTING and change.reason not in NOBODYS_FAULT for change in job.history)


def launch_time(job: Job) -> datetime:
    """When a RESTARTING job is to be launched."""
    lost = 0
    for place in range(len(job.history) - 1, 0, -1):
        change = job.history[place]
        if change.state is not JobState.RESTARTING:
            continue
        if change.reason in NOBODYS_FAULT or change.time - _launch_before(job.history, place).time > SOON:
            break
        lost += 1
    return job.state_time + timedelta(seconds=PAUSES[min(lost, len(PAUSES) - 1)])


def recovery_seconds(job: Job, now: datetime) -> float | None:
    """For a job whose launch makes its first step now: since the launch before was lost; None where none was."""
    before = job.history[-2] if len(job.history) > 1 else job.history[-1]
    return (now - before.time).total_seconds() if before.state is JobState.RESTARTING else None


def _failed_alike_at_once(job: Job, reason: str, first_line: str) -> bool:
    """Whether this launch and the one before ended before their first step, for one reason, in the same words."""
    entered = [now for now, before in zip(job.history, (None, *job.history), strict=False) if not _is_same(now, before)]
    lately = entered[-3:]
    if [change.state for change in lately] != [JobState.STARTING, JobState.RESTARTING, JobState.STARTING]:
        return False
    said = lately[1].message.partition("\n")[0].partition("; goes on from")[0]
    return (lately[1].reason, said) == (reason, first_line)


def _is_same(change: StateChange, before: StateChange | None) -> bool:
    """Whether it is the same stay in a state: another system's queue took the launch, or let go of it."""
    return before is not None and change.state is before.state


def _launch_before(history: tuple[StateChange, ...], place: int) -> StateChange:
    return next(change for change in reversed(history[:place]) if change.state is JobState.STARTING)
