"""A launch that another system was given, such as Slurm: submitted, observed and ended through it.

Rules: the system is asked beside the loop, by threads, since it may take seconds or not answer; until it does, it is
asked again, and the job says so. A launch happens once: it is found again by its name, which is the job's and the
attempt's, and the keeper that the system starts (keeper.py) makes the attempt's record before it runs anything. The
record and the word about the end are files of the shared state folder, as of a local launch; what the system says of
the end counts where it has a cause of its own, or where nobody wrote one down.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import NamedTuple, Protocol

from coordinator.jobs import Observed
from coordinator.launchers import keeper, local
from coordinator.launchers.causes import Cause, explain

FORGOTTEN = "Forgotten"
HANDLE = ".handle"  # behind the record's name: the system's own name for the launch
LOOK_SECONDS = 1.0
RETRY_SECONDS = 5.0  # until a system that did not answer is asked again
RECORD_SECONDS = 10.0  # how long a shared folder may take to show what was written, or a system to see an end
END_SECONDS = 60.0  # until a launch that was to be killed counts as one that cannot be

log = logging.getLogger("paceline.controller")


class NoAnswer(Exception):
    """The system cannot be asked now; the message says what it said."""


class SubmitRefused(Exception):
    """The system will not take this launch; the message says why."""


class Phase(Enum):
    """How far a system is with a launch."""

    WAITS = "waits in its queue"
    STARTS = "is being started"
    RUNS = "runs"
    ENDED = "no process of it is left"


class Seen(NamedTuple):
    """What a system says of a launch, in our words."""

    phase: Phase
    reason: str = ""  # of one that ended: empty where the ranks' logs know better
    message: str = ""


class System(Protocol):
    """What a launch needs of a system. Every call may take seconds and raises NoAnswer."""

    title: str  # as its users call it

    def find(self, name: str) -> str | None:
        """The handle of the launch that was given this name."""

    def look(self, handles: Collection[str]) -> Mapping[str, Seen]:
        """How far it is with each; those it does not know any more are left out."""

    def ask_to_stop(self, handle: str) -> None:
        """Let the ranks write a checkpoint and leave."""

    def end(self, handle: str, kill: bool) -> None:
        """End every process of it: with SIGTERM and the system's own grace, or at once. Nothing where none is left."""


class Watch:
    """Looks at the launches of one system, all at once and again and again while there are any."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._handles: set[str] = set()
        self._seen: dict[str, Seen] = {}
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self.fault: str | None = None  # why the last look was in vain

    def add(self, handle: str) -> None:
        with self._lock:
            self._handles.add(handle)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._loop, name=f"watch {self._system.title}", daemon=True)
                self._thread.start()
        self._wake.set()

    def remove(self, handle: str) -> None:
        with self._lock:
            self._handles.discard(handle)
            self._seen.pop(handle, None)

    def seen(self, handle: str) -> Seen | None:
        """None before the first look that had an answer."""
        with self._lock:
            return self._seen.get(handle)

    def _loop(self) -> None:
        while True:
            self._wake.clear()
            with self._lock:
                handles = sorted(self._handles)
                if not handles:
                    self._thread = None
                    return
            try:
                found = self._system.look(handles)
            except NoAnswer as fault:
                if self.fault is None:
                    log.warning("%s does not answer: %s", self._system.title, fault)
                self.fault = str(fault)
            except Exception as fault:  # whatever it is, every launched job depends on this thread
                log.exception("looking at %s failed; it is tried again", self._system.title)
                self.fault = f"{type(fault).__name__}: {fault}"
            else:
                self.fault = None
                forgotten = Seen(Phase.ENDED, FORGOTTEN, f"{self._system.title} no longer knows it")
                with self._lock:
                    self._seen.update((each, found.get(each, forgotten)) for each in handles if each in self._handles)
            self._wake.wait(LOOK_SECONDS)


class Running:
    """A launch that a system was given, or is being given. Safe to use from several threads.

    Args:
        name: by which the system finds it.
        record: the keeper's file.
        submit: gives it to the system and returns its handle; None where the handle file says that it has it.
    """

    process = None  # its processes are the system's

    def __init__(
        self, system: System, watch: Watch, name: str, record: Path, submit: Callable[[], str] | None = None
    ) -> None:
        self.cause: Cause | None = None  # of the end, where it is the system's
        self._system = system
        self._watch = watch
        self._name = name
        self._record = record
        self._trouble: str | None = None
        self._handle: str | None = None
        self._exit_code: int | None = None
        self._end_seen_at: float | None = None
        self._unwanted = threading.Event()
        self._lock = threading.Lock()
        self._submitter: threading.Thread | None = None
        if submit is None:
            self._take(_handle_file(record).read_text().strip())
        else:
            self._submitter = threading.Thread(target=self._submit, args=(submit,), name=f"submit {name}", daemon=True)
            self._submitter.start()

    def observed(self) -> Observed | None:
        """What the job is to say while no rank has reported."""
        if self._handle is None:
            if self._trouble is None or self.cause is not None:
                return None
            return Observed(
                "HeldByNoAnswer", f"{self._system.title} does not answer and is asked again: {self._trouble}"
            )
        seen = self._watch.seen(self._handle)
        if seen is None or seen.phase is Phase.ENDED:
            return None
        return Observed(seen.reason, seen.message)

    def poll(self) -> int | None:
        """The exit code of mpirun, negative where something else ended it; None while any process of it may run."""
        with self._lock:
            if self._exit_code is None and (code := self._end()) is not None:
                self._exit_code = code
                if self._handle is not None:
                    self._watch.remove(self._handle)
            return self._exit_code

    def wait(self, timeout_seconds: float) -> int | None:
        """Like poll, after at most `timeout_seconds`."""
        deadline = time.monotonic() + timeout_seconds
        while (code := self.poll()) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return code

    def ask_to_stop(self) -> None:
        """Let the ranks write a checkpoint at the next step boundary and leave (ExitCode.INTERRUPTED)."""
        if self._handle is not None:
            self._try(lambda handle: self._system.ask_to_stop(handle))

    def terminate(self, grace_seconds: float) -> int:
        """Have the system end it, kill what is left after the grace, and return the exit code. TimeoutError."""
        self._unwanted.set()
        if self._submitter is not None:
            self._submitter.join(grace_seconds)
        for kill, seconds in ((False, grace_seconds), (True, END_SECONDS)):
            deadline = time.monotonic() + seconds
            while True:
                self._try(lambda handle: self._system.end(handle, kill))  # noqa: B023  # called at once
                if (code := self.wait(min(RETRY_SECONDS, max(0.0, deadline - time.monotonic())))) is not None:
                    return code
                if time.monotonic() >= deadline:
                    break
        what = f"{self._system.title} job {self._handle}" if self._handle else f"the submission of {self._name}"
        trouble = f": {self._trouble}" if self._trouble else ""
        raise TimeoutError(f"{what} is still there {END_SECONDS:g} s after it was to be killed{trouble}")

    def _try(self, act: Callable[[str], None]) -> None:
        if self._handle is None:
            return
        try:
            act(self._handle)
        except NoAnswer as fault:
            self._trouble = str(fault)
            log.warning("%s does not answer: %s", self._system.title, fault)

    def _submit(self, submit: Callable[[], str]) -> None:
        handle = None
        while handle is None:
            if self._unwanted.is_set():
                # What an answer that did not come may have left in the system's queue runs nothing from here on.
                keeper.write_once(str(self._record), keeper.VOID)
                self.cause = Cause("CancelledElsewhere", f"{self._name} was not wanted before it was submitted")
                return
            try:
                # A submission that was not answered may have been taken.
                handle = (self._system.find(self._name) if self._trouble else None) or submit()
            except NoAnswer as fault:
                self._trouble = str(fault)
                self._unwanted.wait(RETRY_SECONDS)
            except SubmitRefused as fault:
                self.cause = Cause("SubmitRefused", f"{self._system.title} refuses the job: {fault}")
                return
            except Exception as fault:  # else the job would wait for ever
                log.exception("submitting %s failed", self._name)
                self.cause = Cause("SubmitRefused", f"cannot be given to {self._system.title}: {fault}")
                return
        self._trouble = None
        _write_handle(self._record, handle)
        self._take(handle)

    def _take(self, handle: str) -> None:
        self._handle = handle
        self._watch.add(handle)

    def _end(self) -> int | None:
        if self._handle is None:
            return 1 if self.cause is not None else None
        code = _recorded_end(self._record)
        if code == 0:
            return 0
        seen = self._watch.seen(self._handle)
        ended = seen if seen is not None and seen.phase is Phase.ENDED else None
        if code is None and ended is None:
            return None
        self._end_seen_at = self._end_seen_at or time.monotonic()
        settled = time.monotonic() - self._end_seen_at > RECORD_SECONDS
        if not settled and (ended is None or (code is None and (self._record.exists() or not ended.reason))):
            return None  # the system or the shared folder may not show it yet
        if ended is not None and ended.reason and (code is None or ended.reason != FORGOTTEN):
            self.cause = Cause(ended.reason, ended.message)
            return -signal.SIGTERM
        return -signal.SIGKILL if code is None else code


def start(system: System, watch: Watch, name: str, log_dir: Path, attempt: int, submit: Callable[[], str]) -> Running:
    """Give it to the system, beside the caller. OSError."""
    log_dir.mkdir(parents=True, exist_ok=True)
    return Running(system, watch, name, local.record_of(log_dir, attempt), submit)


def adopt(system: System, watch: Watch, name: str, log_dir: Path, attempt: int) -> Running | local.Running | None:
    """A launch that an earlier coordinator made, through this system or on its own machine.

    None where there was none, and from then on there will be none under this number.

    Raises:
        OSError: the system, which may have it, does not answer.
    """
    record = local.record_of(log_dir, attempt)
    log_dir.mkdir(parents=True, exist_ok=True)
    if not _handle_file(record).exists():
        try:
            handle = system.find(name)
        except NoAnswer as fault:
            raise OSError(f"{system.title} does not answer: {fault}") from fault
        if handle is None:
            if keeper.write_once(str(record), keeper.VOID) or (text := record.read_text()) == keeper.VOID:
                return None
            if not text.startswith(keeper.HOSTED):
                return local.adopt(log_dir, attempt)
            handle = UNKNOWN_HANDLE
        _write_handle(record, handle)
    return Running(system, watch, name, record)


UNKNOWN_HANDLE = "0"  # of a launch that ran, but whose system has forgotten it: no system gives this number


def explain_end(running: object, exit_code: int, log_dir: Path) -> Cause:
    """The system's own cause, with the last log lines, else what the logs tell."""
    told = explain(exit_code, log_dir)
    if isinstance(running, Running) and running.cause is not None:
        return replace(running.cause, last_lines=told.last_lines)
    return told


def _handle_file(record: Path) -> Path:
    return record.with_name(record.name + HANDLE)


def _write_handle(record: Path, handle: str) -> None:
    keeper.write_once(str(_handle_file(record)), handle + "\n")


def _recorded_end(record: Path) -> int | None:
    try:
        return int(record.with_name(record.name + keeper.ENDED).read_text())
    except FileNotFoundError:
        return None
