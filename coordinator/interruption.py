"""Turns the signals that end a program into one exception, so that what it started is ended with it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):
    """This process was told to end: Ctrl-C, SIGTERM, or its terminal was closed."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number  # as shells count


@contextmanager
def stop_signals(times: int = 1) -> Iterator[None]:
    """Inside, the first `times` such signals raise Interrupted; then they are ignored, so that the ending finishes."""
    left = times

    def interrupt(number: int, _: FrameType | None) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            for each in previous:
                signal.signal(each, signal.SIG_IGN)
        raise Interrupted(number)

    previous = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            previous[number] = signal.signal(number, interrupt)
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
