"""A parameter server's folder among the machine's temporary files, and the end of those whose owner was killed.

Rules: whoever makes one holds the lock of a file in it until it is removed, and loses it with its life, however that
ends. One whose lock is free is left over; it goes when the next one is made. None shows up before it is locked.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path

PREFIX, STARTING = "paceline-server-", "paceline-starting-"
LOCK = "lock"


class ServerFolder:
    """A new one, this process's own."""

    def __init__(self) -> None:
        """Remove what is left over, and make it. OSError where there is no room."""
        remove_left_over(Path(tempfile.gettempdir()))
        made = Path(tempfile.mkdtemp(prefix=STARTING))
        lock = os.open(made / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        self.path = made.with_name(PREFIX + made.name.removeprefix(STARTING))
        made.rename(self.path)
        self._finalizer = weakref.finalize(self, _remove, self.path, lock)  # at the latest when the process exits

    def remove(self) -> None:
        """Take it away. What cannot be removed is left to the next one."""
        self._finalizer()


def _remove(path: Path, lock: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)


def remove_left_over(temporary: Path) -> None:
    """Remove those of this user whose owner is dead."""
    for path in temporary.glob(f"{PREFIX}*/{LOCK}"):
        try:
            lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # another user's, or gone by now
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.parent, ignore_errors=True)
        except OSError:  # its owner lives
            continue
        finally:
            os.close(lock)
