"""Exit codes of `paceline` and `paceline-worker`: one table, used by both programs."""

from enum import IntEnum


class ExitCode(IntEnum):
    """What a script can rely on."""

    DONE = 0
    FAILED = 1  # the job or the verb failed
    USAGE = 2  # bad usage or a bad job file
    UNREACHABLE = 3  # the coordinator, or the job to be joined, cannot be reached
    NOT_ALLOWED = 4
    INTERRUPTED = 5  # told to stop: a checkpoint holds all that was done, and `--resume` goes on from it
