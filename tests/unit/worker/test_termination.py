"""A process that is told to end says its last words, even while its main thread is blocked, and ends by the signal."""

import signal
import subprocess
import sys
import time
from pathlib import Path

PROGRAM = """
import ctypes, sys
from worker.termination import LastWords
words = LastWords(lambda: print("last words", flush=True))
if sys.argv[1] == "stopped":
    words.stop()
print("ready", flush=True)
if sys.argv[1] == "blocked":
    # Unlike time.sleep it comes back to Python only when it is over, as a call into MPI does.
    libc = ctypes.CDLL(None)
    seconds = 60
    while seconds:
        seconds = libc.sleep(seconds)
__import__("time").sleep(60)
"""


def terminated(how: str) -> tuple[int, str, float]:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, how], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        began = time.monotonic()
        process.terminate()
        said, _ = process.communicate(timeout=30)
        return process.returncode, said, time.monotonic() - began


def test_last_words_are_said_while_the_main_thread_is_blocked() -> None:
    code, said, seconds = terminated("blocked")
    assert (code, said) == (-signal.SIGTERM, "last words\n")
    assert seconds < 10


def test_last_words_are_said_while_python_runs() -> None:
    assert terminated("sleeping")[:2] == (-signal.SIGTERM, "last words\n")


def test_stopped_it_leaves_the_signal_as_it_was() -> None:
    assert terminated("stopped")[:2] == (-signal.SIGTERM, "")
