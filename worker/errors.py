"""Faults that end a job, named by who is at fault.

Rules: a message is one line that names the place, the value and the remedy. `paceline-worker` prints it behind
`error: ` and exits with `exit_code`; anything that is not a Fault is our own mistake.
"""

from protos.exit_codes import ExitCode


class Fault(Exception):
    """Something a person can put right; the message says how."""

    exit_code = ExitCode.FAILED


class UsageFault(Fault):
    """The command line or the job file is wrong."""

    exit_code = ExitCode.USAGE


class DataFault(Fault):
    """A data file is missing, damaged, or does not fit the model."""


class ModelFault(Fault):
    """The layers do not fit each other or the samples."""


class TrainingFault(Fault):
    """Training cannot go on: the loss is not finite, a peer is gone."""


class ReplicaFault(Fault):
    """One replica of the model cannot go on, and the others do not know of it: it ends the job for all."""


class UnreachableFault(Fault):
    """The running job that was to be joined or followed cannot be reached."""

    exit_code = ExitCode.UNREACHABLE


class NotAllowedFault(Fault):
    """The running job does not let us in."""

    exit_code = ExitCode.NOT_ALLOWED


class CheckpointFault(Fault):
    """A checkpoint or model file is missing, damaged, or of another model."""


class OutputFault(Fault):
    """The output folder named on the command line cannot be used, or not for this job."""

    exit_code = ExitCode.USAGE
