"""Removes the files of ended jobs whose time to be kept is over (limits.keep_for of the job file).

Rules: the store says which and when, so that a restart forgets none; the job and its history stay. A folder that cannot
be removed is tried again later and holds nobody up.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

from coordinator.folders import job_folder
from coordinator.rows import time_of
from coordinator.store import Store

AGAIN = timedelta(minutes=10)  # after a folder that could not be removed

log = logging.getLogger("paceline.retention")


class Retention:
    """Knows when the next files go. Threads may call note; one calls sweep."""

    def __init__(self, store: Store, state: Path, clock: Callable[[], datetime]) -> None:
        self._store = store
        self._state = state
        self._clock = clock
        self._lock = threading.Lock()
        self._due: datetime | None = clock()  # at the start the store is asked
        self._not_before: dict[str, datetime] = {}  # folders that could not be removed

    def note(self, due: datetime) -> None:
        """Files will be due then; the store knows which."""
        with self._lock:
            self._due = due if self._due is None else min(self._due, due)

    def sweep(self) -> float | None:
        """Remove what is due; the seconds until there is more to do, None where nothing is kept for a time."""
        now = self._clock()
        with self._lock:
            if self._due is None or self._due > now:
                return None if self._due is None else (self._due - now).total_seconds()
            self._due = None
        try:
            for job_id, expires in self._store.expiries():
                due = max(time_of(expires), self._not_before.get(job_id, now))
                if due <= now and not self._remove(job_id):
                    due = self._not_before[job_id] = now + AGAIN
                if due > now:
                    self.note(due)
        except BaseException:
            self.note(now)
            raise
        return self.sweep()

    def _remove(self, job_id: str) -> bool:
        try:
            shutil.rmtree(job_folder(self._state, job_id).path)
        except FileNotFoundError:
            pass  # it never started, or its removal was not written down
        except OSError as fault:
            log.warning("the files of job %s cannot be removed: %s; tried again in %s", job_id, fault, AGAIN)
            return False
        self._store.mark_removed(job_id)
        self._not_before.pop(job_id, None)
        log.info("the files of job %s are removed: limits.keep_for is over", job_id)
        return True
