"""A process told to stop remembers it; SIGTERM leaves it a grace, then it says last words and ends by the signal."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import ctypes, sys, time
from worker.termination import StopRequest
stop = StopRequest()
vain = sys.argv[1] == "vain"
stop.last_words(lambda: vain, lambda too_late: print("too late" if too_late else "last words", flush=True))
if sys.argv[1] != "starting":
    stop.wait_for_step(0.5 if sys.argv[1] == "blocked" else 60)
if sys.argv[1] == "stopped":
    stop.stop()
print("ready", flush=True)
if sys.argv[1] == "blocked":
    # Unlike time.sleep it comes back to Python only when it is over, as a call into MPI does.
    libc = ctypes.CDLL(None)
    seconds = 60
    while seconds:
        seconds = libc.sleep(seconds)
while not stop.asked:
    time.sleep(0.01)
if vain:
    time.sleep(60)
stop.stop()
print("asked by", stop.asked, flush=True)
import os, signal
os.kill(os.getpid(), signal.SIGTERM)
"""


def told(
    how: str, number: signal.Signals = signal.SIGTERM, before: signal.Signals | None = None
) -> tuple[int, str, float]:
    """`before`: a signal sent first, which it is to say a line to."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, how], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        began, first = time.monotonic(), ""
        if before is not None:
            process.send_signal(before)
            first = process.stdout.readline()
        process.send_signal(number)
        said, _ = process.communicate(timeout=30)
        return process.returncode, first + said, time.monotonic() - began


def test_when_the_grace_is_over_last_words_are_said_though_the_main_thread_is_blocked() -> None:
    code, said, seconds = told("blocked")
    assert (code, said) == (-signal.SIGTERM, "too late\n")
    assert 0.5 <= seconds < 20


def test_sigcont_while_a_rank_is_gone_is_time_for_last_words_and_ends_nothing() -> None:
    code, said, _ = told("vain", before=signal.SIGCONT)
    assert (code, said) == (-signal.SIGTERM, "last words\nlast words\n")


@pytest.mark.parametrize("how", ["starting", "vain"])
def test_where_there_is_nothing_to_wait_for_sigterm_ends_it_at_once(how: str) -> None:
    assert told(how)[:2] == (-signal.SIGTERM, "last words\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_who_is_asked_to_stop_knows_by_what_and_is_disturbed_no_more_on_its_way_out(number: signal.Signals) -> None:
    assert told("training", number)[:2] == (0, f"asked by {number.name}\n")


def test_stopped_it_leaves_sigterm_as_it_was() -> None:
    assert told("stopped")[:2] == (-signal.SIGTERM, "")
