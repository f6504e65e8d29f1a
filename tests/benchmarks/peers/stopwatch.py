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
from typing import NamedTuple

import numpy as np


class Arguments(NamedTuple):
    """What the benchmark asks of a peer."""

    units: tuple[int, ...]  # features, hidden layers, classes
    batch_size: int  # samples a rank takes in a step
    epochs: int  # at least 2: the first is not timed
    learning_rate: float
    features: Path  # .npy, uint8 (n, height, width)
    labels: Path  # .npy, int64 (n,)
    rendezvous: Path  # a file that does not exist yet, where the processes of one run can meet


def read_arguments() -> Arguments:
    parser = argparse.ArgumentParser()
    parser.add_argument("--units", type=int, nargs="+", required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--features", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--rendezvous", type=Path, required=True)
    given = vars(parser.parse_args())
    return Arguments(**{**given, "units": tuple(given["units"])})


def load_arrays(arguments: Arguments) -> tuple[np.ndarray, np.ndarray]:
    """Features as float32 (n, height * width) between 0 and 1, labels as int64 (n,): converted once."""
    images = np.load(arguments.features, mmap_mode="r")
    features = images.reshape(len(images), -1).astype(np.float32)
    features *= np.float32(1 / 255)
    return features, np.load(arguments.labels)


class Stopwatch:
    """Times a rank's training: call `step_done` after every step and `epoch_done` after every epoch."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
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
            self._timed_from = now
        else:
            self._timed_samples += samples
            self._timed_seconds = now - self._timed_from

    @property
    def samples_per_second(self) -> float:
        return self._timed_samples / self._timed_seconds


def seconds_since_process_start() -> float:
    """From the kernel's own start time of this process, so that the interpreter and every import count."""
    start_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks / os.sysconf("SC_CLK_TCK")


def peak_memory_bytes() -> int:
    """VmHWM and not ru_maxrss: the latter keeps what the parent process had before exec."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def print_result(stopwatch: Stopwatch, *, peak_memory_bytes: int, train_loss: float, version: str) -> None:
    """The result is the last line of standard output."""
    result = {
        "samples_per_second": stopwatch.samples_per_second,
        "seconds_to_first_step": stopwatch.seconds_to_first_step,
        "peak_memory_bytes": peak_memory_bytes,
        "train_loss": train_loss,
        "version": version,
    }
    print(json.dumps(result), flush=True)
