"""Counting for the training loop: sums since the last report, time by phase, the steady rate, a report's line."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from worker.sync.statistics import ExchangeStatistics

PHASES = ("data", "forward", "backward", "exchange", "update")
FOLLOWING = {"data": "forward", "forward": "backward", "backward": "data"}  # within a share of several pieces


@dataclass(frozen=True)
class Position:
    """How far a run has come: steps, epochs and samples done, and what the evaluations on the way came to."""

    step: int = 0
    epoch: int = 0
    samples: int = 0
    validations: tuple[dict[str, Any], ...] = ()  # one an epoch, by the names of metrics.jsonl
    batches: int = 0  # done of the epoch under way, behind those `epoch` counts
    sums: tuple[float, float, int] = (0.0, 0.0, 0)  # of these batches: loss, right labels, samples
    highest_loss: float = 0.0  # above which the run has diverged; 0 before its first step


def from_plain(held: dict[str, Any]) -> Position:
    """The position whose fields came back from JSON."""
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in held.items()}
    return Position(**fields)


def validation_losses(validations: tuple[dict[str, Any], ...]) -> tuple[float, ...]:
    """The loss of each epoch so far: what schedules and stopping decide by."""
    return tuple(float(validation["validation_loss"]) for validation in validations)


class Meter:
    """Loss, right labels and samples of the global batches since it was made, and this rank's seconds by phase."""

    def __init__(
        self,
        begin_phase: Callable[[str], None] = lambda phase: None,
        sums: tuple[float, float, int] = (0.0, 0.0, 0),
    ) -> None:
        """`begin_phase` is told which phase of computing a share begins; `sums` are what it goes on from."""
        self._begin_phase = begin_phase
        self.began = perf_counter()
        self.phase_seconds = dict.fromkeys(PHASES, 0.0)
        self._loss, self._correct, self._samples = sums
        self._lap = self.began

    def start_step(self) -> None:
        """A step begins now."""
        self._lap = perf_counter()

    def lap(self, phase: str) -> None:
        """What was done since the last lap was `phase`."""
        now = perf_counter()
        self.phase_seconds[phase] += now - self._lap
        self._lap = now
        if phase in FOLLOWING:
            self._begin_phase(FOLLOWING[phase])

    def lap_exchange(self, update_seconds: float) -> None:
        """What was done since the last lap was the exchange, of which so much was the optimizer's."""
        self.lap("exchange")
        self.phase_seconds["exchange"] -= update_seconds
        self.phase_seconds["update"] += update_seconds

    def add(self, loss: float, correct: float, samples: int) -> None:
        """Count one global batch."""
        self._loss += loss
        self._correct += correct
        self._samples += samples

    @property
    def sums(self) -> tuple[float, float, int]:
        """Loss, right labels and samples."""
        return self._loss, self._correct, self._samples

    def mean_loss(self) -> float | None:
        """Over the samples; None before the first."""
        return self._loss / self._samples if self._samples else None

    def accuracy(self) -> float | None:
        """Share of right labels; None where that has no meaning."""
        return finite_or_none(self._correct / self._samples) if self._samples else None

    def samples_per_second(self) -> float:
        """Over the time spent in steps."""
        seconds = sum(self.phase_seconds.values())
        return self._samples / seconds if seconds > 0 else 0.0


class SteadyRate:
    """Samples a second over the steps after the warm-up; evaluation, reports and checkpoints are left out."""

    def __init__(self, warm_up_steps: int) -> None:
        self._warm_up_steps = warm_up_steps
        self._steps = 0
        self._samples = 0
        self._seconds = 0.0
        self._since = perf_counter()

    def step(self, samples: int) -> None:
        """A step of so many samples has ended."""
        now = perf_counter()
        if self._steps == self._warm_up_steps:
            self._samples, self._seconds = 0, 0.0
        self._steps += 1
        self._samples += samples
        self._seconds += now - self._since
        self._since = now

    def pause(self) -> None:
        """What happened since the last step does not count."""
        self._since = perf_counter()

    def samples_per_second(self) -> float:
        """The rate so far; of all steps when there were no more than the warm-up."""
        return self._samples / self._seconds if self._seconds > 0 else 0.0


def make_report(
    position: Position, total_steps: int, meter: Meter, learning_rate: float, wall_seconds: float
) -> dict[str, Any]:
    """One line of metrics.jsonl; names as in the contract. What does not apply is None."""
    return {
        "step": position.step,
        "total_steps": total_steps,
        "epoch": position.epoch,
        "samples": position.samples,
        "loss": meter.mean_loss(),
        "accuracy": meter.accuracy(),
        "learning_rate": learning_rate,
        "samples_per_second": meter.samples_per_second(),
        "wall_seconds": wall_seconds,
        "phase_seconds": dict(meter.phase_seconds),
    }


def rank_report(rank: int, host: str, statistics: ExchangeStatistics) -> dict[str, Any]:
    """What one rank's exchange cost so far, from any thread; names as in the coordinator's RankReport."""
    report: dict[str, Any] = {
        "rank": rank,
        "host": host,
        "exchange_wait_seconds": statistics.wait_seconds,
        "sent_bytes": dict(statistics.sent_bytes),
        "received_bytes": dict(statistics.received_bytes),
    }
    if statistics.servers is not None:
        report |= statistics.servers._asdict()
    return report


def finite_or_none(value: float) -> float | None:
    """JSON has no nan: what has no meaning is left out."""
    return value if math.isfinite(value) else None
