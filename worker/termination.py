"""Last words of a process that is told to end (SIGTERM), as the launcher does to all ranks when one is gone.

Python runs a signal's handler in the main thread and only between two of its instructions; a rank blocked inside MPI
has none. But the interpreter writes the signal's number to a descriptor at once, and a thread reads it there.

Rules: the process ends by the same signal as it would without this. `stop` puts everything back.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable


class LastWords:
    """Calls `say` from a thread of its own when SIGTERM arrives, then lets the signal end the process."""

    def __init__(self, say: Callable[[], None]) -> None:
        """In the main thread."""
        self._say = say
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._fd_before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._handler_before = signal.signal(signal.SIGTERM, lambda *_: None)
        self._thread = threading.Thread(target=self._watch, name="last words", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """SIGTERM is again what it was. In the main thread."""
        signal.signal(signal.SIGTERM, self._handler_before)
        signal.set_wakeup_fd(self._fd_before)
        os.close(self._writing)
        self._thread.join(timeout=5)
        os.close(self._reading)

    def _watch(self) -> None:
        while numbers := os.read(self._reading, 64):
            if signal.SIGTERM in numbers:
                try:
                    self._say()
                finally:
                    # signal.signal is for the main thread alone, which may be blocked.
                    ctypes.CDLL(None).signal(signal.SIGTERM, ctypes.c_void_p(signal.SIG_DFL.value))
                    os.kill(os.getpid(), signal.SIGTERM)
                return
