"""The time that jobs are measured by.

Rules: it begins at the wall clock's time and from then on counts seconds, those of a sleeping machine included. So a
wall clock that is set while jobs run brings no deadline nearer and holds up no restart, and of two moments on record
the later one has the later time. A coordinator that is started anew goes by the wall clock of that moment.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime, timedelta


def seconds_since_boot() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def steady_clock(
    wall: Callable[[], datetime], seconds: Callable[[], float] = seconds_since_boot
) -> Callable[[], datetime]:
    """A clock that agrees with the wall clock now, and goes on whatever is done to that one."""
    began, began_seconds = wall(), seconds()
    return lambda: began + timedelta(seconds=seconds() - began_seconds)
