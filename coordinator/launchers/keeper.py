"""Runs one launch and writes down how it ended, for a coordinator that may die and come back meanwhile.

It is a program of its own (`python -I -S keeper.py RECORD FOLDER FOLDER PROGRAM ARGUMENT...`), leads the launch's
session and is the parent of `mpirun`, so that somebody is there to learn its exit code.

Where another system starts and ends it (`keeper.py --hosted RECORD PROGRAM ARGUMENT...`, in a batch job of Slurm's or
as the first process of a container), it may lead no session, and SIGTERM comes with a grace: to it alone, or to every
process. Then the session is mpirun's own, which does not see SIGTERM, since it would kill its ranks a quarter of a
second later; it is told SIGUSR1 instead, and the ranks write a checkpoint and leave.

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
HOSTED = "hosted "  # begins the record of a launch that another system started
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
    """Run it in this session and return its exit code as a shell would."""
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
    return _end(record, scratch, code)


def main_hosted(record: str, argv: list[str]) -> int:
    """Run it in a session of its own, told to leave by SIGUSR1, and return its exit code as a shell would."""
    asked: list[int] = []
    child = 0

    def hand_on(number: int, _: object) -> None:
        asked.append(number)
        if child:
            os.kill(child, signal.SIGUSR1)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, hand_on)
    own = os.getpid()
    scratch = f"{os.environ.get('TMPDIR', '/tmp')}/paceline-{own}-{time.time_ns() % 1_000_000_000}"
    if not write_once(record, f"{HOSTED}{scratch}\n"):
        return _RECORDED_BY_ANOTHER
    os.mkdir(scratch, 0o700)  # or all launches of a user here would share one session folder
    try:
        child = os.posix_spawn(
            argv[0],
            argv,
            {**os.environ, "TMPDIR": scratch},
            setsid=True,
            setsigmask=[signal.SIGTERM],  # the ranks see it all the same: mpirun starts them with no signal masked
            setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],
        )
    except OSError as fault:
        print(f"cannot run {argv[0]}: {fault.strerror}", file=sys.stderr)
        return _end(record, [scratch], CANNOT_RUN)
    if asked:  # what came before there was a child
        os.kill(child, signal.SIGUSR1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    session, child = child, 0  # its number may be another's from now on
    if remaining := kill_session(session):
        print(f"processes {remaining} are still there {_KILL_SECONDS:g} s after SIGKILL", file=sys.stderr)
    return _end(record, [scratch], code)


def _end(record: str, scratch: list[str], code: int) -> int:
    """Write down how it ended."""
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
    if sys.argv[1] == "--hosted":
        sys.exit(main_hosted(sys.argv[2], sys.argv[3:]))
    sys.exit(main(sys.argv[1], sys.argv[2:4], sys.argv[4:]))
