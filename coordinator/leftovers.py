"""Finds and ends what a killed coordinator left running.

Rules: a process is ended only when it is surely the job's: the recorded launcher with the recorded start time, or one
whose environment holds the job's own token. A pid alone proves nothing: it may be somebody else's by now.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from coordinator.auth import digest_of
from coordinator.jobs import Job, Process
from coordinator.launchers.keeper import read_stat
from protos import environment

_POLL_SECONDS = 0.02
_KILL_SECONDS = 5.0


def identify(pid: int) -> Process | None:
    """The process that has this pid now, None when there is none or it is only waiting to be reaped."""
    stat = read_stat(pid)
    return None if stat is None or stat.state in "ZX" else Process(pid, stat.start_ticks)


def end_leftovers(job: Job, grace_seconds: float) -> int:
    """End every process of the job, kindly and then not; how many there were. TimeoutError when one will not go."""
    found = _processes(job)
    left = found
    for signal_number, seconds in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, _KILL_SECONDS)):
        for process in left:
            try:
                os.kill(process.pid, signal_number)
            except ProcessLookupError:
                continue  # it ended in between, as it should
        deadline = time.monotonic() + seconds
        while left := {process for process in _processes(job) | found if identify(process.pid) == process}:
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_SECONDS)
        if not left:
            return len(found)
    pids = ", ".join(str(process.pid) for process in sorted(left))
    raise TimeoutError(f"processes {pids} of job {job.id} are still there {_KILL_SECONDS:g} s after SIGKILL")


def _processes(job: Job) -> set[Process]:
    found = set(_token_holders(job))
    if job.process is not None and identify(job.process.pid) == job.process:
        found.add(job.process)
    return found


def _token_holders(job: Job) -> Iterator[Process]:
    """Living processes that were given the job's token: the launcher and every rank, in whatever process group."""
    name = f"{environment.JOB_TOKEN}=".encode()
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            variables = Path(entry.path, "environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # ended while we looked, or another user's and so not ours
        for variable in variables:
            if not variable.startswith(name):
                continue
            secret = variable[len(name) :].decode(errors="replace")
            if digest_of(secret) == job.token_digest and (process := identify(int(entry.name))) is not None:
                yield process
