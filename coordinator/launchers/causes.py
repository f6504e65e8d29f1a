"""Says why a launch failed, from its exit code, the ranks' logs and what `mpirun` wrote.

Rules: nothing here runs a process. Logs go on from one attempt at the job to the next, and what stands above the line
that begins the last one is not looked at. The first thing that went wrong is the cause: a rank killed by a signal
before the errors of its peers, a rank's own `error: ` line before the bare exit code mpirun saw. What Open MPI says is
matched with line breaks folded, since it wraps at 80 columns; the tests hold the patterns to recorded output.
"""

from __future__ import annotations

import os
import re
import signal
from dataclasses import dataclass, replace
from pathlib import Path

LAUNCHER_LOG = "launcher.log"
ERROR_PREFIX = "error: "
ATTEMPT_PREFIX = "=== attempt "
LAST_LINES = 10
SAID_BY_RANKS = ("RankFailed", "RanksFailed")

# What mpirun says -> our reason and one line. Groups: rank, host, signal, code, path as they occur.
KILLED = re.compile(
    r"noticed that process rank (?P<rank>\d+) with PID \d+ on node (?P<host>\S+) exited on signal (?P<signal>\d+)"
)
EXITED = re.compile(r"Process name: \[[^\]]*,(?P<rank>\d+)\] Exit code: +(?P<code>\d+)")
ABORTED = re.compile(r"has exited due to process rank (?P<rank>\d+) .*calling \"abort\"")
# Which of these comes is chance where a host dies; after the first, mpirun's exit code may be 0.
HOST_LOST = re.compile(r"lost communication with a remote daemon\..*? Remote daemon *: \S+ on node (?P<host>\S+)")
PEER_LOST = re.compile(r"communication peer process has unexpectedly disconnected\..*? Peer host: +(?P<host>\S+)")
DAEMON_LOST = re.compile(r"daemon failed to report back after being spawned\..*? Remote host: +(?P<host>\S+)")
GONE = re.compile(r"^error: rank (?P<rank>\d+) of \d+ on \S+: gone (?P<place>in [^;]*);", re.M)  # said by a survivor
OWN_FAULT = re.compile(r"rank (?P<rank>\d+)(?: of \d+)?(?: on \S+)?: ")
LAUNCHER_FAULTS = (
    (
        re.compile(
            r"(?:^| )host (?P<host>\S+) cannot be used: (?P<fault>.*?)(?= host \S+ cannot be used: |$)"
        ),  # reach.py
        "HostUnreachable",
        "host {host} cannot be used: {fault}",
    ),
    (
        re.compile(r"not enough slots available in the system to satisfy the (?P<slots>\d+) slots"),
        "NotEnoughSlots",
        "mpirun has fewer than {slots} slots: ask for fewer workers",
    ),
    (
        re.compile(r"could not access an executable: Executable: (?P<path>\S+)"),
        "WorkerMissing",
        "mpirun cannot run {path}: is Paceline installed there?",
    ),
    (
        re.compile(r"detected an attempt to run as root"),
        "RootRefused",
        "mpirun refuses to run as root: set OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1",
    ),
)


@dataclass(frozen=True)
class Cause:
    """Why a launch ended as it did."""

    reason: str  # one CamelCase word for programs
    message: str  # one line for people
    rank: int | None = None
    exit_code: int | None = None
    signal: str | None = None  # its name, such as SIGKILL
    # Of the rank's log, of rank 0's where that is empty, of all ranks' where it was mpirun that was killed, else of the
    # launcher's; without what the message tells.
    last_lines: tuple[str, ...] = ()

    @property
    def told_whole(self) -> bool:
        """Whether a rank said itself what was wrong and the logs' last lines add nothing to it."""
        return self.reason in SAID_BY_RANKS and not self.last_lines


def explain(exit_code: int, log_dir: Path) -> Cause:
    """The cause of a launch that ended with `exit_code`, as Running.poll gives it: negative for a signal."""
    cause = _cause(exit_code, log_dir)
    return replace(cause, last_lines=tuple(line for line in cause.last_lines if not _is_told(line, cause.message)))


def _cause(exit_code: int, log_dir: Path) -> Cause:
    launcher_lines = _lines(log_dir / LAUNCHER_LOG)
    logs = {rank: _lines(path) for rank, path in rank_logs(log_dir).items()}
    said = " ".join(" ".join(launcher_lines).split())
    errors = {rank: line for rank, lines in logs.items() if (line := _error_line(lines))}

    if lost := HOST_LOST.search(said):  # whatever its peers made of it
        message = f"mpirun lost host {lost['host']} in the middle of the run"
        return Cause("HostLost", message, None, exit_code, None, _last_of_each(logs))
    if (killed := KILLED.search(said)) and int(killed["rank"]) not in errors:
        return _killed_rank(killed, exit_code, logs)
    if errors:
        return _failed_rank(errors, exit_code, logs)
    if (line := _error_line(launcher_lines)) is not None:  # a rank that ended before it had a log of its own
        return Cause("RankFailed", line, _own_rank(line), exit_code, None, _last(launcher_lines))
    if exit_code < 0:
        message = f"mpirun was killed by {signal_words(-exit_code)}, and its ranks with it"
        last_lines = _last_of_each(logs) or _last(launcher_lines)
        return Cause("LauncherKilled", message, None, None, signal_name(-exit_code), last_lines)
    for pattern, reason, message in LAUNCHER_FAULTS:
        if match := pattern.search(said):
            return Cause(reason, message.format(**match.groupdict()), None, exit_code, None, _last(launcher_lines))
    if exited := EXITED.search(said):
        rank, code = int(exited["rank"]), int(exited["code"])
        lines = logs.get(rank, [])
        return Cause(
            "RankExited", f"rank {rank} exited with code {code}{_final_words(lines)}", rank, code, None, _last(lines)
        )
    if (aborted := ABORTED.search(said)) and (lines := logs.get(int(aborted["rank"]), [])):
        rank = int(aborted["rank"])
        return Cause(
            "RankAborted", f"rank {rank} stopped the job{_final_words(lines)}", rank, exit_code, None, _last(lines)
        )
    if daemon := DAEMON_LOST.search(said):
        message = (
            f"mpirun has no daemon on host {daemon['host']}: the host died, or a firewall keeps it from calling back"
        )
        return Cause("HostLost", message, None, exit_code, None, _last_of_each(logs))
    if peer := PEER_LOST.search(said):
        message = f"a rank on host {peer['host']} is gone without a word: it, or its host, has died"
        return Cause("HostLost", message, None, exit_code, None, _last_of_each(logs))
    message = f"mpirun ended with exit code {exit_code}{_final_words(launcher_lines)}"
    return Cause("LaunchFailed", message, None, exit_code, None, _last(launcher_lines))


def begin_attempt(log_dir: Path, attempt: int) -> None:
    """Write the line that parts it from the one before into every log."""
    for path in (log_dir / LAUNCHER_LOG, *rank_logs(log_dir).values()):
        with open(path, "a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":  # a rank may have been killed in mid-line
                    file.write(b"\n")
            file.write(f"{ATTEMPT_PREFIX}{attempt} ===\n".encode())


def rank_logs(log_dir: Path) -> dict[int, Path]:
    """The ranks' log files, by rank."""
    found = {int(path.stem.removeprefix("rank-")): path for path in log_dir.glob("rank-[0-9]*.log")}
    return dict(sorted(found.items()))


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal has no name of its own
        return f"signal {number}"


def signal_words(number: int) -> str:
    return f"signal {number} ({signal_name(number)})"


def _killed_rank(match: re.Match[str], exit_code: int, logs: dict[int, list[str]]) -> Cause:
    rank, number = int(match["rank"]), int(match["signal"])
    message = f"rank {rank} on {match['host']} was killed by {signal_words(number)}"
    said = GONE.finditer("\n".join(line for lines in logs.values() for line in lines))
    if place := next((gone["place"] for gone in said if int(gone["rank"]) == rank), None):
        message += f" {place}"
    return Cause("RankKilled", message, rank, exit_code, signal_name(number), _last(logs.get(rank) or logs.get(0, [])))


def _failed_rank(errors: dict[int, str], exit_code: int, logs: dict[int, list[str]]) -> Cause:
    """An error that names its rank is that rank's own. Without a name it is the job's, said by rank 0 for all ranks,
    or by each; should another rank alone say it, its log names the rank."""
    for line in errors.values():
        if (named := _own_rank(line)) is not None:
            return Cause("RankFailed", line, named, exit_code, None, _last(logs.get(named, [])))
    rank, line = next(iter(errors.items()))
    if rank == 0 or len(errors) > 1:
        return Cause("RanksFailed", line, None, exit_code, None, _last(logs[rank]))
    return Cause("RankFailed", f"rank {rank}: {line}", rank, exit_code, None, _last(logs[rank]))


def _own_rank(line: str) -> int | None:
    match = OWN_FAULT.match(line)
    return int(match["rank"]) if match else None


def _error_line(lines: list[str]) -> str | None:
    """What the last `error: ` line says, and those right above it: a job file may have several faults."""
    last = max((number for number, line in enumerate(lines) if line.startswith(ERROR_PREFIX)), default=None)
    if last is None:
        return None
    first = last
    while first > 0 and lines[first - 1].startswith(ERROR_PREFIX):
        first -= 1
    return "; ".join(line.removeprefix(ERROR_PREFIX) for line in lines[first : last + 1])


def _is_told(line: str, message: str) -> bool:
    """Whether the message already has the line: as one of the errors, or as the final words behind a bare exit code."""
    if (gone := GONE.match(line)) is not None and gone["place"] in message:
        return True
    words = line.removeprefix(ERROR_PREFIX).strip()
    return bool(words) and (words in message if line.startswith(ERROR_PREFIX) else message.endswith(f": {words}"))


def _final_words(lines: list[str]) -> str:
    """A log's last line that says something, to go behind a bare exit code."""
    words = next((line.strip() for line in reversed(lines) if line.strip(" -")), "")
    return f": {words}" if words else " and said nothing"


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return []
    lines = text.replace("\0", "").splitlines()  # mpirun ends some of its messages with a NUL
    begun = max((number for number, line in enumerate(lines) if line.startswith(ATTEMPT_PREFIX)), default=-1)
    return lines[begun + 1 :]


def _last(lines: list[str]) -> tuple[str, ...]:
    return tuple(lines[-LAST_LINES:])


def _last_of_each(logs: dict[int, list[str]]) -> tuple[str, ...]:
    """How far every rank was, in LAST_LINES at most unless there are more ranks than that."""
    speaking = {rank: lines for rank, lines in logs.items() if lines}
    share = max(1, LAST_LINES // max(1, len(speaking)))
    return tuple(f"rank-{rank} | {line}" for rank, lines in speaking.items() for line in lines[-share:])
