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
def stop_signals() -> Iterator[None]:
    """Inside, the first such signal raises Interrupted; those after it are ignored, so that the ending is finished."""

    def interrupt(number: int, _: FrameType | None) -> None:
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
