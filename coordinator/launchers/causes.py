"""Says why a launch failed, from its exit code, the ranks' logs and what `mpirun` wrote.

Rules: nothing here runs a process. The first thing that went wrong is the cause: a rank killed by a signal before the
errors of its peers, a rank's own `error: ` line before the bare exit code mpirun saw. What Open MPI says is matched
with line breaks folded, since it wraps at 80 columns; the tests hold the patterns to recorded output.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from pathlib import Path

LAUNCHER_LOG = "launcher.log"
ERROR_PREFIX = "error: "
LAST_LINES = 10

# What mpirun says -> our reason and one line. Groups: rank, host, signal, code, path as they occur.
KILLED = re.compile(
    r"noticed that process rank (?P<rank>\d+) with PID \d+ on node (?P<host>\S+) exited on signal (?P<signal>\d+)"
)
EXITED = re.compile(r"Process name: \[[^\]]*,(?P<rank>\d+)\] Exit code: +(?P<code>\d+)")
ABORTED = re.compile(r"has exited due to process rank (?P<rank>\d+) .*calling \"abort\"")
OWN_FAULT = re.compile(r"rank (?P<rank>\d+)(?: of \d+)?(?: on \S+)?: ")
LAUNCHER_FAULTS = (
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
    last_lines: tuple[str, ...] = ()  # of the rank's log, or of the launcher's when no rank is at fault


def explain(exit_code: int, log_dir: Path) -> Cause:
    """The cause of a launch that ended with `exit_code`, as Running.poll gives it: negative for a signal."""
    launcher_lines = _lines(log_dir / LAUNCHER_LOG)
    logs = {rank: _lines(path) for rank, path in rank_logs(log_dir).items()}
    said = " ".join(" ".join(launcher_lines).split())
    errors = {rank: line for rank, lines in logs.items() if (line := _error_line(lines))}

    if (killed := KILLED.search(said)) and int(killed["rank"]) not in errors:
        return _killed_rank(killed, exit_code, logs)
    if errors:
        return _failed_rank(errors, exit_code, logs, world_size=len(logs))
    if (line := _error_line(launcher_lines)) is not None:  # a rank that ended before it had a log of its own
        return Cause("RankFailed", line, _own_rank(line), exit_code, None, _last(launcher_lines))
    if exit_code < 0:
        message = f"mpirun was killed by {signal_words(-exit_code)}, and its ranks with it"
        return Cause("LauncherKilled", message, None, None, signal_name(-exit_code), _last(launcher_lines))
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
    message = f"mpirun ended with exit code {exit_code}{_final_words(launcher_lines)}"
    return Cause("LaunchFailed", message, None, exit_code, None, _last(launcher_lines))


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
    return Cause("RankKilled", message, rank, exit_code, signal_name(number), _last(logs.get(rank, [])))


def _failed_rank(errors: dict[int, str], exit_code: int, logs: dict[int, list[str]], world_size: int) -> Cause:
    """An error that names its rank is that rank's own; one that all ranks share is nobody's; another is of its log."""
    for line in errors.values():
        if (named := _own_rank(line)) is not None:
            return Cause("RankFailed", line, named, exit_code, None, _last(logs.get(named, [])))
    rank, line = next(iter(errors.items()))
    shared = world_size == 1 or len(set(errors.values())) == 1 < len(errors)
    message = line if shared else f"rank {rank}: {line}"
    return Cause("RankFailed", message, rank, exit_code, None, _last(logs[rank]))


def _own_rank(line: str) -> int | None:
    match = OWN_FAULT.match(line)
    return int(match["rank"]) if match else None


def _error_line(lines: list[str]) -> str | None:
    """The last `error: ` line, without the prefix."""
    return next((line[len(ERROR_PREFIX) :] for line in reversed(lines) if line.startswith(ERROR_PREFIX)), None)


def _final_words(lines: list[str]) -> str:
    """A log's last line that says something, to go behind a bare exit code."""
    words = next((line.strip() for line in reversed(lines) if line.strip(" -")), "")
    return f": {words}" if words else " and said nothing"


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(errors="replace")

    except FileNotFoundError:
        return []
    return text.replace("\0", "").splitlines()  # mpirun ends some of its messages with a NUL


def _last(lines: list[str]) -> tuple[str, ...]:
    return tuple(lines[-LAST_LINES:])
