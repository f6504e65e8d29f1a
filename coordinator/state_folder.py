"""The state folder: made for its owner alone, and one coordinator's at a time.

Rules: the lock dies with its process, however that ends. A refused start leaves no folder that was not there before.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from protos.exit_codes import ExitCode

LOCK = "lock"


def default_state() -> Path:
    """Where the XDG rules put what a program must keep."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "paceline"


class CannotServe(Exception):
    """The coordinator cannot start; the message says why and what to do."""

    def __init__(self, message: str, exit_code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextlib.contextmanager
def locked(state: Path) -> Iterator[None]:
    """The state folder, for this coordinator alone; CannotServe."""
    try:
        missing = [folder for folder in (state, *state.parents) if not folder.exists()]
        state.mkdir(parents=True, exist_ok=True, mode=0o700)  # logs and data paths are nobody else's business
        file = open(state / LOCK, "a+", encoding="utf-8")  # noqa: SIM115  # closed below
    except OSError as fault:
        raise CannotServe(f"--state: cannot use {state}: {fault.strerror}") from fault
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            message = f"another coordinator (pid {file.read().strip() or 'unknown'}) uses {state}"
            raise CannotServe(f"{message}: stop it, or give this one another --state folder") from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        # Looked at under the lock: another coordinator may have made the folder, and kept jobs in it, meanwhile.
        made = missing if [path.name for path in state.iterdir()] == [LOCK] else []
        try:
            yield
        except CannotServe:
            _remove_made(made)
            raise


def _remove_made(folders: Sequence[Path]) -> None:
    """Undo what a refused start made: the state folder with all in it, and the folders above it that hold nothing."""
    if folders:
        shutil.rmtree(folders[0], ignore_errors=True)  # the refusal is what must be told
    with contextlib.suppress(OSError):  # somebody has put something there meanwhile
        for folder in folders[1:]:
            folder.rmdir()
