"""What ends a verb of `paceline` before it is done.

Rules: the message names the fault and the remedy; each of its lines is printed behind `error: ` and the program ends
with `exit_code`. Anything that is not a CommandFault is our own mistake.
"""

from __future__ import annotations

from protos.exit_codes import ExitCode


class CommandFault(Exception):
    """A fault a person can put right."""

    def __init__(self, message: str, exit_code: int = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def say_faults(message: str) -> str:
    """The lines a person gets: every fault on its own."""
    return "\n".join(f"error: {line}" for line in message.splitlines())
