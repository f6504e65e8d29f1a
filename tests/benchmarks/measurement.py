"""One timed run of one contender: the command, its deadline, and what it has to have measured.

Rules: nothing is timed from outside; a contender states its own figures, by the definitions in peers/stopwatch.py. A
run that failed, hung, did not learn or took more threads than its own ends the benchmark with one line that says which.
"""

import json
import math
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

# Every contender gets one thread a process; gloo is told to keep to loopback.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}
# A shell's wish for certain kernels would reach some contenders and not others: each library chooses for itself.
KERNEL_WISHES = (
    "ATEN_CPU_CAPABILITY",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_DEBUG_CPU_TYPE",
    "MKL_ENABLE_INSTRUCTIONS",
    "NPY_DISABLE_CPU_FEATURES",
    "NPY_ENABLE_CPU_FEATURES",
    "ONEDNN_MAX_CPU_ISA",
    "OPENBLAS_CORETYPE",
)
DEADLINE_SECONDS = 180.0
MOST_CORES = 1.1  # a thread keeps busy, with what the interpreter does beside it
LAST_CHARACTERS = 2000  # of a failed run's output, shown


class BenchmarkFailed(Exception):
    """A contender could not be measured; the message says which and why."""


class PeerAbsent(Exception):
    """A peer cannot run on this machine; the message says what it lacks."""


class Command(NamedTuple):
    """What is run for one measurement."""

    argv: tuple[str, ...]
    environment: dict[str, str]  # additions


class Measurement(NamedTuple):
    """What one run says of itself; nan is what it does not measure."""

    samples_per_second: float  # steady state
    seconds_to_first_step: float = math.nan  # from the start of rank 0's process to the end of its first step
    peak_memory_bytes: float = math.nan  # of the largest rank
    train_loss: float = math.nan
    version: str = ""  # of a peer; empty for ours
    flop: float = math.nan  # floating-point operations of the matrix products of a step


FIGURES = Measurement._fields[:4]


def read_statement(output: str) -> dict[str, Any]:
    """The JSON object on the last line of what a program printed.

    Raises:
        BenchmarkFailed: it is not there.
    """
    lines = output.splitlines()
    if not lines:
        raise BenchmarkFailed("printed no result")
    try:
        stated = json.loads(lines[-1])
    except ValueError as error:
        raise BenchmarkFailed(f"ended with what is not a result: {lines[-1]}") from error
    if not isinstance(stated, dict):
        raise BenchmarkFailed(f"ended with what is not a result: {lines[-1]}")
    return stated


def read_measurement(stated: Mapping[str, Any], classes: int) -> Measurement:
    """Check a contender's own statement.

    Raises:
        BenchmarkFailed: a figure is missing or not positive, the loss is no better than guessing, or a peer, which
            states `busy_cores`, the cores that each of its ranks kept busy, had more than one thread.
    """
    for field in FIGURES:
        value = stated.get(field)
        can_be_zero = field == "train_loss"  # of who is quick enough to learn everything by heart
        if not isinstance(value, int | float) or not 0 <= value < math.inf or (value == 0 and not can_be_zero):
            raise BenchmarkFailed(f"states {field} as {value!r}; a positive number is needed")
    chance = math.log(classes)
    if stated["train_loss"] >= chance:
        raise BenchmarkFailed(f"did not learn: its loss is {stated['train_loss']:.3f}, guessing has {chance:.3f}")
    busy_cores = stated.get("busy_cores", 0.0)
    if busy_cores > MOST_CORES:
        raise BenchmarkFailed(f"kept {busy_cores:.2f} cores busy a rank, and is to have one thread")
    return Measurement(**{field: float(stated[field]) for field in FIGURES}, version=str(stated.get("version", "")))


def make_environment(inherited: Mapping[str, str], command: Command) -> dict[str, str]:
    """What a contender's process sees: all that is inherited but the wishes for kernels, one thread, its own."""
    kept = {name: value for name, value in inherited.items() if name not in KERNEL_WISHES}
    return {**kept, **ENVIRONMENT, **command.environment}


def run_command(command: Command, folder: Path, deadline_seconds: float = DEADLINE_SECONDS) -> str:
    """Run it in `folder` in a session of its own and return its standard output.

    Raises:
        BenchmarkFailed: it failed (with the end of what it said) or was still running at the deadline, and was ended.
    """
    process = subprocess.Popen(
        command.argv,
        env=make_environment(os.environ, command),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            output, complaints = process.communicate(timeout=deadline_seconds)
        except subprocess.TimeoutExpired as expired:
            what = " ".join(command.argv)
            raise BenchmarkFailed(f"was still running after {deadline_seconds:g} s: {what}") from expired
        finally:
            if process.returncode is None:  # the deadline, or the user's Ctrl-C
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode != 0:
        said = (output + complaints)[-LAST_CHARACTERS:].strip()
        raise BenchmarkFailed(f"exited with {process.returncode}: {' '.join(command.argv)}\n{said}")
    return output
