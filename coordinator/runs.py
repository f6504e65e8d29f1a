"""A launched job's processes as the controller holds them, and what is done to end them.

Rules: ending takes time and is done beside the loop, once for each run: by a thread that waits for the processes. What
the end means for the job is decided when they are gone (controller.py).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from coordinator import jobs
from coordinator.folders import JobFolder
from coordinator.jobs import Job, Process
from coordinator.launchers.local import Cause

LEAVE_SECONDS = 5.0  # beyond limits.grace_seconds, for ranks that write a checkpoint, on their way out

log = logging.getLogger("paceline.controller")


class Running(Protocol):
    """A started launch (launchers.local.Running, launchers.foreign.Running)."""

    @property
    def process(self) -> Process | None: ...  # None where another system has the processes

    def observed(self) -> jobs.Observed | None: ...  # how far another system is with it, where there is one

    def poll(self) -> int | None: ...

    def wait(self, timeout_seconds: float) -> int | None: ...

    def ask_to_stop(self) -> None: ...

    def terminate(self, grace_seconds: float) -> int: ...


# The worker's arguments, and the variables that every rank must see, of a job, its token and its folder.
Command = Callable[[Job, str, JobFolder], tuple[list[str], dict[str, str]]]


class Launcher(NamedTuple):
    """What the controller needs of a launcher."""

    start: Callable[[Job, str, JobFolder], Running]  # the job, its token, its folder; OSError or LauncherMissing
    adopt: Callable[[Job, JobFolder], Running | None]  # what another coordinator started; None where it had not
    explain: Callable[[Running, int, Path], Cause]  # what ended, its exit code and the log folder


@dataclass
class Run:
    """A launched job's processes, and the end that was decided for them when it is not their own."""

    running: Running
    adopted: bool = False  # another coordinator started them
    ending: jobs.Broke | jobs.Lost | None = None
    pauser: threading.Thread | None = None
    stopper: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether somebody is at it to end them."""
        return any(thread is not None and thread.is_alive() for thread in (self.pauser, self.stopper))

    def end(self, job: Job, grace_seconds: float, ended: Callable[[], None]) -> None:
        """Have the processes end, without a checkpoint."""
        if self.stopper is None:
            self.stopper = threading.Thread(target=self._terminate, args=(job.id, grace_seconds, ended), daemon=True)
            self.stopper.start()

    def pause(self, job: Job, grace_seconds: float, ended: Callable[[], None]) -> None:
        """Have the ranks write a checkpoint and leave, and end them where they do not."""
        if self.pauser is None and self.stopper is None:
            patience_seconds = job.spec.limits.grace_seconds + LEAVE_SECONDS
            # Before its first step a rank may not listen to the polite signal yet, and has nothing to keep.
            polite = job.state is jobs.JobState.RUNNING
            arguments = (job.id, patience_seconds if polite else 0.0, grace_seconds, ended)
            self.pauser = threading.Thread(target=self._let_leave, args=arguments, daemon=True)
            self.pauser.start()

    def _let_leave(
        self, job_id: str, patience_seconds: float, grace_seconds: float, ended: Callable[[], None]
    ) -> None:  # fmt: skip
        if patience_seconds:
            self.running.ask_to_stop()
            deadline = time.monotonic() + patience_seconds
            # In short looks: a cancel may end the processes meanwhile.
            while self.stopper is None:
                if self.running.wait(0.1) is not None:
                    ended()
                    return
                if time.monotonic() > deadline:
                    log.warning("job %s did not leave within %g s and is ended", job_id, patience_seconds)
                    break
        if self.stopper is None:
            self._terminate(job_id, grace_seconds, ended)

    def _terminate(self, job_id: str, grace_seconds: float, ended: Callable[[], None]) -> None:
        try:
            self.running.terminate(grace_seconds)
        except TimeoutError as fault:
            log.error("job %s will not end: %s", job_id, fault)
        ended()
