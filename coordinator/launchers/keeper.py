"""Runs one launch and writes down how it ended, for a coordinator that may die and come back meanwhile.

It is a program of its own (`python -I -S keeper.py RECORD FOLDER FOLDER PROGRAM ARGUMENT...`), leads the launch's
session and is the parent of `mpirun`, so that somebody is there to learn its exit code.

Rules: RECORD is made at one stroke and once, and without it nothing is run: whoever makes it first decides whether the
launch happens. When `mpirun` has ended, so have its ranks before RECORD.ended says so. Nothing but the standard
library, and little of that, since every launch waits for it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

ENDED = ".ended"  # behind the record's name: the exit code, negative for a signal
VOID = "void\n"  # a record that was made so that no launch can
CANNOT_RUN = 126  # as shells say it

_KILL_SECONDS = 5.0  # how long killed processes may take to disappear
_POLL_SECONDS = 0.005
_RECORDED_BY_ANOTHER = 125


class Stat(NamedTuple):
    """What /proc/PID/stat says of a process."""

    state: str  # Z and X: it has ended
    session: int
    start_ticks: int


def main(record: str, scratch: list[str], argv: list[str]) -> int:
    """Run it and return its exit code as a shell would."""
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda got, _: asked.append(got))
    own = os.getpid()
    stat = read_stat(own)
    assert stat is not None, "/proc has no entry for the process that reads it"
    text = "\n".join([f"{own} {stat.start_ticks}", *scratch]) + "\n"
    if not write_once(record, text):
        _remove(scratch)
        return _RECORDED_BY_ANOTHER
    try:
        child = os.posix_spawn(argv[0], argv, os.environ, setsigdef=[signal.SIGPIPE, signal.SIGXFSZ])
    except OSError as fault:
        print(f"cannot run {argv[0]}: {fault.strerror}", file=sys.stderr)
        code = CANNOT_RUN
    else:
        for signal_number in asked:  # what came before there was a child; later ones reach it too, as one of the group
            os.kill(child, signal_number)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    remaining = kill_session(own, but=own)
    if remaining:
        print(f"processes {remaining} are still there {_KILL_SECONDS:g} s after SIGKILL", file=sys.stderr)
    _remove(scratch)
    with open(f"{record}{ENDED}.new", "w") as file:
        file.write(f"{code}\n")
    os.rename(f"{record}{ENDED}.new", record + ENDED)
    return code if code >= 0 else 128 - code


def write_once(path: str, text: str) -> bool:
    """Make the file with all its text at one stroke; False where it is there already."""
    draft = f"{path}.{os.getpid()}"
    with open(draft, "w") as file:
        file.write(text)
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    finally:
        os.unlink(draft)
    return True


def read_stat(pid: int) -> Stat | None:
    """None where there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", errors="replace") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold blanks and brackets; field 3 comes first
    return Stat(fields[0], int(fields[3]), int(fields[19]))


def kill_session(session: int, but: int = 0) -> list[int]:
    """Kill every process of a session, see them gone, and return those that will not go."""
    deadline = time.monotonic() + _KILL_SECONDS
    while members := [pid for pid in _members(session) if pid != but]:
        for pid in members:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it ended in between, as it should
        if time.monotonic() > deadline:
            return members
        time.sleep(_POLL_SECONDS)
    return []


def _members(session: int) -> Iterator[int]:
    """Ids of the living processes of a session."""
    for name in os.listdir("/proc"):
        if name.isdigit() and (stat := read_stat(int(name))) and stat.session == session and stat.state not in "ZX":
            yield int(name)


def _remove(folders: list[str]) -> None:
    import shutil  # for the end of a launch alone

    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:4], sys.argv[4:]))
