"""Wakes whoever waits for something to change.

Rules: one counter for the whole coordinator; it moves at every change, and a waiter names the last value it saw, so no
change is missed and none is queued: a slow watcher reads the newest state and nothing piles up behind it.
"""

from __future__ import annotations

import threading


class Changes:
    """A counter with a bell. Threads may call every method."""

    def __init__(self) -> None:
        self._moved = threading.Condition()
        self._count = 0
        self._closed = False

    @property
    def count(self) -> int:
        with self._moved:
            return self._count

    @property
    def closed(self) -> bool:
        """No change will come any more."""
        with self._moved:
            return self._closed

    def ring(self) -> None:
        with self._moved:
            self._count += 1
            self._moved.notify_all()

    def close(self) -> None:
        with self._moved:
            self._closed = True
            self._moved.notify_all()

    def wait(self, seen: int, timeout_seconds: float) -> int:
        """The counter, as soon as it is not `seen`, the bell is closed, or the time is over."""
        with self._moved:
            self._moved.wait_for(lambda: self._count != seen or self._closed, timeout_seconds)
            return self._count
