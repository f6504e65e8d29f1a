"""Brings the launched jobs of an earlier coordinator, killed or stopped, under this one.

Rules: a launch that left its record is taken over, whether it still runs or has ended: what becomes of it is decided as
of one's own. One that left none never ran and never will (local.adopt sees to that), so it can be made once. What its
workers could not report meanwhile is read from their metrics.jsonl when they have ended.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

from google.protobuf import json_format

from coordinator import jobs, recovery
from coordinator.folders import JobFolder
from coordinator.jobs import Job, JobState
from coordinator.leftovers import end_leftovers
from coordinator.runs import Launcher, Running
from protos import job_pb2

REPORTS_AT_ONCE = 1000

log = logging.getLogger("paceline.controller")


def take_over(
    job: Job, launcher: Launcher, folder: JobFolder, grace_seconds: float
) -> Running | jobs.Lost | jobs.Paused | jobs.Stopped | jobs.Broke:
    """The processes of a launched job, or what becomes of it where there never were any."""
    try:
        running = launcher.adopt(job, folder)
        if running is not None and running.poll() is None:
            return running
        # Of a launch whose keeper was killed too, or of a version that had none.
        count = end_leftovers(job, grace_seconds)
        if running is not None:
            return running
    except (OSError, ValueError, TimeoutError) as fault:
        message = (
            f"the coordinator was killed while this job was {job.state} and cannot tell what became of it: {fault}"
        )
        return jobs.Stopped(message) if job.state is JobState.CANCELLING else jobs.Broke("ProcessesRemain", message)
    found = f"{count} of its processes were still there and were ended" if count else "it had not been launched yet"
    if job.state is JobState.CANCELLING:
        return jobs.Stopped(f"cancelled; {found} when the coordinator came back")
    if job.pausing:
        return jobs.Paused(f"paused; {found} when the coordinator came back")
    message = f"the coordinator was killed while this job was {job.state}; {found}: it is launched now"
    return jobs.Lost(recovery.COORDINATOR_RESTARTED, message)


def unreported(folder: JobFolder) -> Iterator[list[job_pb2.Report]]:
    """What the workers wrote down, in the order they did; the store knows which of it is new."""
    try:
        lines = folder.metrics.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as fault:
        if not isinstance(fault, FileNotFoundError):
            log.warning("reports may be missing, %s cannot be read: %s", folder.metrics, fault)
        return
    for some in _pieces(lines):
        try:
            yield [
                json_format.ParseDict(json.loads(line), job_pb2.Report(), ignore_unknown_fields=True) for line in some
            ]
        except (ValueError, json_format.ParseError) as fault:
            log.warning("reports are missing, %s is damaged: %s", folder.metrics, fault)
            return


def _pieces(lines: list[str]) -> Iterator[list[str]]:
    for first in range(0, len(lines), REPORTS_AT_ONCE):
        yield lines[first : first + REPORTS_AT_ONCE]
