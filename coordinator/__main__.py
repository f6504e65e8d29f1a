"""`paceline`: what people type. Hands the worker's verbs to paceline-worker, everything else to cli.py.

Rules: whatever goes wrong ends with lines `error: ...` on standard error and a code of protos/exit_codes.py; a
traceback is shown only with PACELINE_DEBUG=1.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from coordinator.faults import CommandFault, say_faults
from protos.exit_codes import ExitCode

DEBUG = "PACELINE_DEBUG"
WORKER_VERBS = ("train", "evaluate", "predict", "export", "plan", "join", "follow")


def main() -> None:
    """Run the program and exit with its code."""
    try:
        if sys.argv[1:2] and sys.argv[1] in WORKER_VERBS:
            hand_over(sys.argv[1:])
        from coordinator.cli import app

        app(prog_name="paceline")  # leaves by SystemExit
    except CommandFault as fault:
        leave(str(fault), fault.exit_code)
    except KeyboardInterrupt:
        leave("interrupted", 130)
    except Exception as error:  # our own mistake: it must still say its name, and where to look
        if os.environ.get(DEBUG):
            raise
        kind = type(error).__name__
        leave(f"internal error: {kind}: {error}; set {DEBUG}=1 to see where, and please report it", ExitCode.FAILED)
    finally:
        close_output()


def hand_over(arguments: list[str]) -> NoReturn:
    """Become paceline-worker, as git becomes git-foo: its NumPy and MPI are never loaded here."""
    from coordinator.launchers.local import LauncherMissing, find_worker

    try:
        worker = find_worker()
    except LauncherMissing as missing:
        raise CommandFault(str(missing)) from missing
    os.execv(worker, [worker, *arguments])


def leave(message: str, code: int) -> NoReturn:
    """Print the message and exit."""
    print(say_faults(message), file=sys.stderr, flush=True)
    raise SystemExit(int(code))


def close_output() -> None:
    """Flush while an error can still be handled: a reader that left, as `head` does, is no fault."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
