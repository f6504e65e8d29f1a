"""A worker whose rank raises, is killed or stands still in one phase: PHASE FAULT RANK STEP, then the worker's words.

The phase is the one in which the worker says it is (worker/sync/progress.py), so the fault comes just behind its start.
"""

import os
import signal
import sys

from worker import __main__
from worker.sync.progress import PHASES, Progress

phase, fault, rank, step = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
assert phase in PHASES
enter = Progress.enter


def faulty(self: Progress, entered: str, number: int | None = None) -> None:
    enter(self, entered, number)
    own = next(place for place in self.whereabouts() if place.process == os.getpid())
    if entered != phase or own.step < step or own.rank != rank:
        return
    if fault == "raises":
        raise ValueError("out of cheese")
    os.kill(os.getpid(), signal.SIGKILL if fault == "killed" else signal.SIGSTOP)


Progress.enter = faulty  # type: ignore[method-assign]
sys.argv[1:] = sys.argv[5:]
__main__.main()
