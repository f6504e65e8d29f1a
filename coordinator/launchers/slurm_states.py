"""What Slurm says of a job -> how far it is, our reason and one line.

Rules: tables; a word that is in none is passed on as it is. States as `squeue --format=%T` prints them, reasons as `%r`
does (squeue(1), JOB STATE CODES and JOB REASON CODES). {job}: its number. {nodes}: those it has. {why}: Slurm's reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from coordinator.launchers.foreign import Phase, Seen


class Row(NamedTuple):
    """What to make of a word of Slurm's."""

    phase: Phase
    reason: str
    message: str


STARTED = Row(Phase.RUNS, "Launching", "Slurm job {job} runs on {nodes}; its ranks are starting")
LOGS_KNOW = Row(Phase.ENDED, "", "")  # the ranks, or the keeper, have written down why

STATES: Mapping[str, Row] = MappingProxyType(
    {
        "CONFIGURING": Row(Phase.WAITS, "HeldForNodes", "Slurm makes {nodes} ready for job {job}"),
        "RUNNING": STARTED,
        "COMPLETING": STARTED,
        "SIGNALING": STARTED,
        "STAGE_OUT": STARTED,
        "RESIZING": STARTED,
        "SUSPENDED": Row(Phase.WAITS, "HeldSuspended", "Slurm job {job} is suspended: scontrol resume {job}"),
        "STOPPED": Row(Phase.WAITS, "HeldSuspended", "Slurm job {job} is stopped: scancel --signal=CONT {job}"),
        "REQUEUED": Row(Phase.WAITS, "HeldForRequeue", "Slurm job {job} was put back into the queue"),
        "REQUEUE_FED": Row(Phase.WAITS, "HeldForRequeue", "Slurm job {job} was put back into the queue"),
        "REQUEUE_HOLD": Row(Phase.WAITS, "HeldByAdministrator", "Slurm job {job} is held: scontrol release {job}"),
        "RESV_DEL_HOLD": Row(Phase.WAITS, "HeldForReservation", "the reservation of Slurm job {job} was removed"),
        "SPECIAL_EXIT": Row(Phase.WAITS, "HeldByAdministrator", "Slurm job {job} is held: scontrol release {job}"),
        "COMPLETED": LOGS_KNOW,
        "FAILED": LOGS_KNOW,
        "CANCELLED": Row(Phase.ENDED, "CancelledElsewhere", "Slurm job {job} was cancelled in Slurm"),
        "DEADLINE": Row(Phase.ENDED, "CancelledElsewhere", "Slurm job {job} was ended at its deadline"),
        "REVOKED": Row(Phase.ENDED, "CancelledElsewhere", "Slurm job {job} was taken away by its federation"),
        "TIMEOUT": Row(
            Phase.ENDED, "TimeLimitReached", "Slurm ended job {job} at its time limit: --launcher-option time=LONGER"
        ),
        "PREEMPTED": Row(Phase.ENDED, "Preempted", "Slurm job {job} gave way to one of higher priority"),
        "NODE_FAIL": Row(Phase.ENDED, "NodeFailed", "Slurm lost a node of job {job} ({nodes})"),
        "BOOT_FAIL": Row(Phase.ENDED, "NodeFailed", "Slurm could not boot a node for job {job} ({nodes})"),
        "OUT_OF_MEMORY": Row(
            Phase.ENDED,
            "OutOfMemory",
            "Slurm job {job} used more memory than it had: --launcher-option mem-per-cpu=MORE",
        ),
    }
)

# Of a job that is PENDING: Slurm's reason -> ours, and what it means.
PENDING: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "None": ("HeldForTurn", "Slurm has not looked at it yet"),
        "Priority": ("HeldForTurn", "jobs of higher priority are ahead"),
        "Resources": ("HeldForNodes", "it is next, and waits for free nodes or cores"),
        "Dependency": ("HeldForTurn", "it waits for another job"),
        "BeginTime": ("HeldForTurn", "its time to begin has not come"),
        "Cleaning": ("HeldForRequeue", "what is left of its last run is being removed"),
        "Prolog": ("HeldForNodes", "the nodes' prologue still runs"),
        "Licenses": ("HeldForLicence", "it waits for a licence"),
        "Reservation": ("HeldForReservation", "it waits for its reservation to begin"),
        "ReqNodeNotAvail": ("HeldForNodes", "a node it asks for is down or reserved: see sinfo --list-reasons"),
        "NodeDown": ("HeldForNodes", "a node it needs is down: see sinfo --list-reasons"),
        "PartitionDown": ("HeldByPartition", "its partition is closed: an administrator opens it, with State=UP"),
        "PartitionInactive": ("HeldByPartition", "its partition is inactive: an administrator opens it, with State=UP"),
        "PartitionConfig": ("HeldByPartition", "its partition has fewer nodes or cores: ask for fewer workers"),
        "PartitionNodeLimit": ("HeldByPartition", "its partition gives fewer nodes: ask for fewer workers"),
        "PartitionTimeLimit": ("HeldByPartition", "its partition gives less time: --launcher-option time=LESS"),
        "BadConstraints": ("HeldByConstraint", "no node has what it asks for: see --launcher-option constraint, nodes"),
        "JobHeldUser": ("HeldByUser", "somebody holds it: scontrol release {job}"),
        "JobHeldAdmin": ("HeldByAdministrator", "an administrator holds it"),
        "InvalidAccount": ("HeldByAccount", "its account is no longer good: --launcher-option account=ANOTHER"),
        "InvalidQOS": ("HeldByAccount", "its quality of service is no longer good: --launcher-option qos=ANOTHER"),
        "JobLaunchFailure": ("HeldForNodes", "it could not be started on its nodes: see slurmctld's log"),
    }
)  # fmt: skip
# By how the reason begins, where there are many of a kind.
PENDING_KINDS: tuple[tuple[str, str, str], ...] = (
    ("QOS", "HeldByLimit", "a limit of its quality of service is reached"),
    ("Assoc", "HeldByLimit", "a limit of its account is reached"),
    ("MaxJob", "HeldByLimit", "a limit on jobs is reached"),
    ("ReqNodeNotAvail", "HeldForNodes", PENDING["ReqNodeNotAvail"][1]),
    ("launch failed", "HeldByAdministrator", "it could not be started and is held: scontrol release {job}"),
)


def seen_of(job: str, state: str, nodes: str, why: str) -> Seen:
    """What squeue or sacct printed of a job, in our words."""
    if state == "PENDING":
        reason, meaning = _pending(why)
        return Seen(Phase.WAITS, reason, f"Slurm job {job} waits ({why}): {meaning.format(job=job)}")
    row = STATES.get(state)
    if row is None:
        return Seen(Phase.STARTS, "SlurmState", f"Slurm says of job {job}: {state}")
    return Seen(row.phase, row.reason, row.message.format(job=job, nodes=nodes or "no node"))


def _pending(why: str) -> tuple[str, str]:
    if (row := PENDING.get(why)) is not None:
        return row
    kinds = ((reason, meaning) for begins, reason, meaning in PENDING_KINDS if why.startswith(begins))
    return next(kinds, ("HeldBySlurm", "see squeue(1) for this reason"))
