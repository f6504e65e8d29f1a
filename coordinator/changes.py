"""Wakes whoever waits for something to change about a job.

Rules: each job that is watched has a bell with a counter; it moves at every change, and a waiter names the last value
it saw, so no change is missed and none is queued: a slow watcher reads the newest state and nothing piles up behind it.
A job that nobody watches costs nothing, and its changes wake nobody.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Bell:
    """Of one job. Threads may call every method."""

    def __init__(self, lock: threading.Lock, closed: bool) -> None:
        self._moved = threading.Condition(lock)
        self._count = 0
        self._closed = closed
        self.listeners = 0  # kept by Changes

    @property
    def count(self) -> int:
        with self._moved:
            return self._count

    def ring(self) -> None:
        with self._moved:
            self.move()

    def wait(self, seen: int, timeout_seconds: float) -> int:
        """The counter, as soon as it is not `seen`, the bell is closed, or the time is over."""
        with self._moved:
            self._moved.wait_for(lambda: self._count != seen or self._closed, timeout_seconds)
            return self._count

    def move(self, closed: bool = False) -> None:
        """Under the lock."""
        self._count += not closed
        self._closed |= closed
        self._moved.notify_all()


class Changes:
    """The bells of all jobs that are watched. Threads may call every method."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bells: dict[str, Bell] = {}
        self._closed = False

    @property
    def closed(self) -> bool:
        """No change will come any more."""
        with self._lock:
            return self._closed

    @contextlib.contextmanager
    def watching(self, job_id: str) -> Iterator[Bell]:
        """The job's bell, which rings within the block."""
        with self._lock:
            bell = self._bells.setdefault(job_id, Bell(self._lock, self._closed))
            bell.listeners += 1
        try:
            yield bell
        finally:
            with self._lock:
                bell.listeners -= 1
                if not bell.listeners:
                    del self._bells[job_id]

    def ring(self, *job_ids: str) -> None:
        with self._lock:
            for job_id in job_ids:
                if job_id in self._bells:
                    self._bells[job_id].move()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for bell in self._bells.values():
                bell.move(closed=True)
