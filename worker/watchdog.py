"""Ends a rank that makes no progress, because nothing may hang.

A rank blocked in a collective cannot look at a clock, so a thread does: the training loop tells it what it is about to
do, and if the same thing takes longer than the limit the thread names it and ends the process, which ends the job.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic


class Watchdog:
    """Watches one rank.

    Args:
        limit_seconds: how long one activity may take (`limits.stall_seconds`).
        on_stall: called once, from the watching thread, with a sentence; it is expected to end the process.
        on_look: called from that thread each time it looks, which the process does as long as it runs at all.
        is_alone: there is no other rank that this one could wait for.
    """

    def __init__(
        self,
        limit_seconds: float,
        on_stall: Callable[[str], None],
        on_look: Callable[[], None] = lambda: None,
        is_alone: bool = False,
    ) -> None:
        self._limit_seconds = limit_seconds
        self._on_look = on_look
        self._is_alone = is_alone
        self._on_stall = on_stall
        self._doing = "starting"
        self._least_seconds = 0.0
        self._since = monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def doing(self, activity: str, least_seconds: float = 0.0) -> None:
        """State what comes next; its time starts now. It may take `least_seconds` though the limit be shorter."""
        self._least_seconds = least_seconds
        self._doing = activity
        self._since = monotonic()

    def stop(self) -> None:
        """Watch no longer."""
        self._stopped.set()
        self._thread.join(timeout=5)

    def _watch(self) -> None:
        looked = monotonic()
        while not self._stopped.wait(look_seconds(self._limit_seconds)):
            self._on_look()
            now = monotonic()
            if now - looked > self._limit_seconds / 2:
                self._since = now  # we were stopped ourselves: that time is nobody's fault
            looked = now
            stuck_seconds = now - self._since
            if stuck_seconds > max(self._limit_seconds, self._least_seconds):
                limit = f"limits.stall_seconds ({self._limit_seconds:g}) is too short for this job"
                if not self._is_alone:
                    limit = f"another rank is stuck or gone, or {limit}"
                self._on_stall(f"no progress for {stuck_seconds:.0f} s while {self._doing}; {limit}")
                return


def look_seconds(limit_seconds: float) -> float:
    """How long a watchdog waits between two looks."""
    return min(1.0, limit_seconds / 4)
