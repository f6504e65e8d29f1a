"""What every peer measures and how: the arguments it takes, its clock, its memory, the one JSON line it prints.

Rules: a peer is a program of its own, run by the Python of the peers' environment; it imports nothing of Paceline.
The definitions are those of Paceline's summary.json: samples a second over every epoch but the first, seconds from
the start of the rank's process to the end of its first step, peak resident memory of the largest rank.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Arguments(NamedTuple):
    """What the benchmark asks of a peer."""

    model: list[Any]  # layers as in a job file
    batch_size: int  # samples a rank takes in a step
    epochs: int  # at least 2: the first is not timed
    learning_rate: float
    scratch: Path  # an empty folder, this run's own
    features: Path | None  # .npy, uint8 (n, height, width)
    labels: Path | None  # .npy, int64 (n,)
    text: Path | None  # in place of both: a text whose bytes are the tokens,
    context: int  # so many of them a sample, and the byte behind each is its target


def read_arguments() -> Arguments:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=json.loads, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--features", type=Path)
    parser.add_argument("--labels", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--context", type=int, default=0)
    return Arguments(**vars(parser.parse_args()))


def load_arrays(arguments: Arguments) -> tuple[np.ndarray, np.ndarray]:
    """Features and targets, converted once.

    Images as float32 (n, height, width) between 0 and 1 with labels int64 (n,); of a text both are int64 (n, context).
    """
    if arguments.text is not None:
        return cut_text(arguments.text, arguments.context)
    features = np.load(arguments.features, mmap_mode="r").astype(np.float32)
    features *= np.float32(1 / 255)
    return features, np.load(arguments.labels)


def cut_text(path: Path, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Features and targets int64 (n, context) of a text: its bytes side by side, and the byte behind each."""
    tokens = np.fromfile(path, np.uint8).astype(np.int64)
    samples = (len(tokens) - 1) // context
    size = samples * context
    return tokens[:size].reshape(samples, context), tokens[1 : size + 1].reshape(samples, context)


def kind_and_options(layer: Any) -> tuple[str, dict[str, Any]]:
    """A layer of a job file: a name, or a name with its options."""
    if isinstance(layer, str):
        return layer, {}
    ((kind, options),) = layer.items()
    return kind, options


class Stopwatch:
    """Times a rank's training: call `step_done` after every step and `epoch_done` after every epoch."""

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, busy_clock: Callable[[], float] = time.process_time
    ) -> None:
        self._clock = clock
        self._busy_clock = busy_clock  # of all threads together
        self._busy_from = self._busy_seconds = 0.0
        self.seconds_to_first_step = 0.0
        self._timed_from: float | None = None
        self._timed_samples = 0
        self._timed_seconds = 0.0

    def step_done(self) -> None:
        if not self.seconds_to_first_step:
            self.seconds_to_first_step = seconds_since_process_start()

    def epoch_done(self, samples: int) -> None:
        """`samples` is what all ranks together trained on; the first epoch starts the clock and is not counted."""
        now = self._clock()
        if self._timed_from is None:
            self._timed_from, self._busy_from = now, self._busy_clock()
        else:
            self._timed_samples += samples
            self._timed_seconds = now - self._timed_from
            self._busy_seconds = self._busy_clock() - self._busy_from

    @property
    def samples_per_second(self) -> float:
        return self._timed_samples / self._timed_seconds

    @property
    def busy_cores(self) -> float:
        """How many cores the threads of this process kept busy."""
        return self._busy_seconds / self._timed_seconds


def seconds_since_process_start() -> float:
    """From the kernel's own start time of this process, so that the interpreter and every import count."""
    start_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks / os.sysconf("SC_CLK_TCK")


def peak_memory_bytes() -> int:
    """VmHWM and not ru_maxrss: the latter keeps what the parent process had before exec."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def print_result(
    stopwatch: Stopwatch, *, peak_memory_bytes: float, train_loss: float, version: str, devices: int = 1
) -> None:
    """The result is the last line of standard output. `devices`: how many ranks this process is."""
    result = {
        "samples_per_second": stopwatch.samples_per_second,
        "seconds_to_first_step": stopwatch.seconds_to_first_step,
        "peak_memory_bytes": peak_memory_bytes / devices,
        "busy_cores": stopwatch.busy_cores / devices,
        "train_loss": train_loss,
        "version": version,
    }
    print(json.dumps(result), flush=True)


def print_absent(reason: str) -> None:
    """The result of a peer that cannot run on this machine."""
    print(json.dumps({"absent": reason}), flush=True)
