"""What the coordinator says no to: one word for programs, one sentence for people.

The word decides the gRPC status (answers.STATUS_CODES); nothing here knows gRPC.
"""

from __future__ import annotations

from collections.abc import Sequence

from protos.rules import Violation
from protos.wording import quoted


class Refused(Exception):
    """A call that is answered with no, and why."""

    def __init__(self, reason: str, message: str, violations: Sequence[Violation] = (), quota: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.violations = tuple(violations)
        self.quota = quota  # the limit that was reached, where it was one


def no_such_job(job_id: str) -> Refused:
    return Refused("JobNotFound", f"there is no job {quoted(job_id)} here; `paceline list` shows those there are")
