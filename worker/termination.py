"""What a rank does when it is told to stop: SIGTERM, as Slurm, Kubernetes and mpirun send it, or SIGUSR1.

SIGTERM asks for the end within a grace: the training loop finishes its step, and all ranks write a checkpoint and leave
together. Where the loop cannot come that far, because a rank is gone or the grace is over, the process says its last
words and ends by the signal. SIGUSR1 asks for the same and sets no grace; mpirun hands it on to all ranks, which it
does with SIGTERM only to kill them a quarter of a second later. When a rank is gone mpirun sends the others SIGCONT, a
quarter of a second later SIGTERM and as much later SIGKILL: so who hears SIGCONT looks whether there are last words.

Python runs a signal's handler in the main thread and only between two of its instructions; a rank blocked inside MPI
has none. But the interpreter writes the signal's number to a descriptor at once, and a thread reads it there.

Rules: before training has begun there is nothing to keep, and SIGTERM ends the process at once. `stop` puts back what
was, but for signals that would only disturb a process on its way out.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import threading
from collections.abc import Callable
from time import monotonic

LOOK_SECONDS = 0.05  # between two looks whether the wait for the step is in vain


class StopRequest:
    """Hears the signals, from the moment it is made. One a process, made in its main thread.

    Attributes:
        asked: the name of the first signal that told this rank to stop; None while there was none.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self._grace_seconds = 0.0  # until `wait_for_step`
        self._is_vain: Callable[[], bool] = lambda: False
        self._say: Callable[[bool], None] = lambda in_vain: None
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._fd_before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._handler_before = signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGUSR1, lambda *_: None)
        signal.signal(signal.SIGCONT, lambda *_: None)
        self._thread = threading.Thread(target=self._watch, name="stop request", daemon=True)
        self._thread.start()

    def last_words(self, is_vain: Callable[[], bool], say: Callable[[bool], None]) -> None:
        """What to do once SIGTERM has come, or SIGCONT while a rank is gone; both are called from another thread.

        Args:
            is_vain: whether waiting for the step is, because another rank is gone.
            say: called before the process ends by the signal, perhaps twice; is told whether the grace was over.
        """
        self._is_vain, self._say = is_vain, say

    def wait_for_step(self, grace_seconds: float) -> None:
        """From here on there is something to keep: SIGTERM leaves so much time for it."""
        self._grace_seconds = grace_seconds

    def stop(self) -> None:
        """The process is on its way out. In the main thread."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN if self.asked else self._handler_before)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        signal.set_wakeup_fd(self._fd_before)
        os.close(self._writing)
        self._thread.join(timeout=5)
        os.close(self._reading)

    def _watch(self) -> None:
        terminated_at: float | None = None
        while True:
            readable, _, _ = select.select([self._reading], [], [], None if terminated_at is None else LOOK_SECONDS)
            if readable:
                numbers = os.read(self._reading, 64)
                if not numbers:
                    return
                for number in numbers:
                    if number in (signal.SIGTERM, signal.SIGUSR1):
                        self.asked = self.asked or signal.Signals(number).name
                if signal.SIGTERM in numbers and terminated_at is None:
                    terminated_at = monotonic()
                if signal.SIGCONT in numbers and terminated_at is None and self._is_vain():
                    self._say(False)
            if terminated_at is None:
                continue
            over = monotonic() - terminated_at >= self._grace_seconds
            if over or self._is_vain():
                try:
                    self._say(over and self._grace_seconds > 0)
                finally:
                    # signal.signal is for the main thread alone, which may be blocked.
                    ctypes.CDLL(None).signal(signal.SIGTERM, ctypes.c_void_p(signal.SIG_DFL.value))
                    os.kill(os.getpid(), signal.SIGTERM)
                return
