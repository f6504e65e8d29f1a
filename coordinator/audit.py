"""The audit log: who did what, when, from where, and what came of it; a JSON document on each line.

Rules: lines are only added; no secret and nothing of a job file is in one, but names, ids and outcomes. A file that
has reached its size is kept beside the new one, and the oldest of them goes. Those whom nobody knows have a file of
their own: however often they knock, they push no known caller's deeds out. A line that cannot be written is told in
the coordinator's log and holds up nobody.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

KNOWN = "audit.jsonl"
UNKNOWN = "audit-unknown.jsonl"
FILE_BYTES = 8 * 1024 * 1024
FILES_KEPT = 8  # beside the one that is written
LONGEST_TEXT = 200  # characters of anything a caller chose

log = logging.getLogger("paceline.audit")


class Deed(NamedTuple):
    """One line. `who` is None where no token was asked for; `known` is whether a token or this machine vouched."""

    call: str  # `CancelJob`, `GET /metrics`, `token create`
    who: str | None
    role: str | None
    job: str
    peer: str
    outcome: str  # a gRPC status code: OK, NOT_FOUND, ...
    reason: str = ""  # of a refusal, in one word
    known: bool = True


class AuditLog:
    """The two files in a state folder. Any thread may write."""

    def __init__(
        self, state: Path, clock: Callable[[], datetime], file_bytes: int = FILE_BYTES, kept: int = FILES_KEPT
    ) -> None:
        self._state = state
        self._clock = clock
        self._file_bytes = file_bytes
        self._kept = kept
        self._lock = threading.Lock()

    def write(self, deed: Deed) -> None:
        line = {
            "time": self._clock().isoformat(timespec="milliseconds"),
            "call": deed.call,
            "who": deed.who,
            "role": deed.role,
            "job": deed.job[:LONGEST_TEXT],
            "from": deed.peer[:LONGEST_TEXT],
            "outcome": deed.outcome,
            **({"reason": deed.reason} if deed.reason else {}),
        }
        try:
            with self._lock:
                self._append(self._state / (KNOWN if deed.known else UNKNOWN), f"{json.dumps(line)}\n".encode())
        except OSError as fault:
            log.error("the audit log in %s cannot be written: %s; missing: %s", self._state, fault.strerror, line)

    def _append(self, path: Path, line: bytes) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            if os.fstat(descriptor).st_size + len(line) > self._file_bytes and self._kept:
                os.close(descriptor)
                descriptor = -1
                for number in range(self._kept - 1, 0, -1):
                    older = path.with_name(f"{path.name}.{number}")
                    if older.exists():
                        older.replace(path.with_name(f"{path.name}.{number + 1}"))
                path.replace(path.with_name(f"{path.name}.1"))
                descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            os.write(descriptor, line)
        finally:
            if descriptor >= 0:
                os.close(descriptor)
