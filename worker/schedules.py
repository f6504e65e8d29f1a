"""Learning rates as functions of the samples seen.

Rules: a schedule is pure. It knows the samples seen before a step and the validation losses so far, and no step, rank
or clock: so it is the same for any number of ranks, and a resumed run takes it up where it was. Warm-up comes before
any schedule and rises to the rate that one begins with; the schedule counts its samples from the warm-up's end.
Formulas are those of PyTorch's schedulers, with samples in the place of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final, NamedTuple, TypeAlias

from protos import job_pb2

Losses: TypeAlias = tuple[float, ...]

# schedule(samples seen before the step, validation losses of the epochs so far) -> learning rate of the step.
Schedule: TypeAlias = Callable[[int, Losses], float]


class Span(NamedTuple):
    """What a schedule has ahead of it when the warm-up is over."""

    samples: int  # to the end of training
    epoch_samples: int  # in one epoch


# factor(samples seen since the warm-up, validation losses) -> what the base rate is multiplied by.
Factor: TypeAlias = Callable[[int, Losses], float]


def constant(options: job_pb2.ConstantSchedule, span: Span) -> Factor:
    """The base rate."""
    return lambda seen, losses: 1.0


def step(options: job_pb2.StepSchedule, span: Span) -> Factor:
    """factor^k after k periods of `epochs`; a period is a whole number of samples (PyTorch's StepLR)."""
    period = max(1, round(options.epochs * span.epoch_samples))
    return lambda seen, losses: float(options.factor ** (seen // period))


def cosine(options: job_pb2.CosineSchedule, span: Span) -> Factor:
    """final + (1 - final)(1 + cos(pi s/S))/2 (Loshchilov and Hutter 2017, without restarts; CosineAnnealingLR)."""
    return lambda seen, losses: _half_cosine(1.0, options.final, seen / span.samples)


def one_cycle(options: job_pb2.OneCycleSchedule, span: Span) -> Factor:
    """From `initial` up to 1, then down to `final`, each along half a cosine (Smith and Topin 2018; OneCycleLR).

    PyTorch peaks and ends one step earlier, and its momentum moves too; ours stays.
    """
    peak = options.rise * span.samples

    def factor(seen: int, losses: Losses) -> float:
        if seen <= peak:
            return _half_cosine(options.initial, 1.0, seen / peak)
        return _half_cosine(1.0, options.final, (seen - peak) / (span.samples - peak))

    return factor


def exponential(options: job_pb2.ExponentialSchedule, span: Span) -> Factor:
    """factor^e after e epochs, fractions of one included (ExponentialLR at each epoch's start)."""
    return lambda seen, losses: float(options.factor ** (seen / span.epoch_samples))


def reduce_on_plateau(options: job_pb2.ReduceOnPlateauSchedule, span: Span) -> Factor:
    """factor^k after k plateaus, but not below `minimum` (ReduceLROnPlateau with a relative threshold)."""
    # Counted once an epoch and not at each step.
    count = lru_cache(maxsize=1)(lambda losses: plateaus(options, losses))
    return lambda seen, losses: max(float(options.factor ** count(losses)), options.minimum)


def plateaus(options: job_pb2.ReduceOnPlateauSchedule, losses: Losses) -> int:
    """How often the losses stopped improving: more than `patience` epochs in a row without a new best.

    The epochs of the cooldown after a plateau are not counted.
    """
    best, bad, resting, found = math.inf, 0, 0, 0
    for loss in losses:
        if loss < best * (1 - options.minimum_improvement):
            best, bad = loss, 0
        else:
            bad += 1
        if resting:
            resting, bad = resting - 1, 0
        if bad > options.patience:
            found, resting, bad = found + 1, options.cooldown, 0
    return found


SCHEDULES: Final[dict[str, Callable[[Any, Span], Factor]]] = {
    "constant": constant,
    "step": step,
    "cosine": cosine,
    "one_cycle": one_cycle,
    "exponential": exponential,
    "reduce_on_plateau": reduce_on_plateau,
}


def make_schedule(spec: job_pb2.Schedule, base: float, epoch_samples: int, epochs: int) -> Schedule:
    """The schedule a resolved job names.

    Args:
        base: learning rate that the optimizer names.
        epoch_samples: samples in one epoch.
        epochs: of the whole training.
    """
    warm_up = round(spec.warm_up_epochs * epoch_samples)
    # A warm-up as long as the training leaves the schedule nothing to do.
    span = Span(max(1, epochs * epoch_samples - warm_up), epoch_samples)
    kind = spec.WhichOneof("kind") or "constant"
    factor = SCHEDULES[kind](getattr(spec, kind), span)

    def schedule(seen: int, losses: Losses) -> float:
        if seen < warm_up:
            risen = spec.warm_up_start + (1 - spec.warm_up_start) * seen / warm_up
            return base * risen * factor(0, losses)
        return base * factor(seen - warm_up, losses)

    return schedule


def _half_cosine(first: float, last: float, done: float) -> float:
    """From `first` at done = 0 to `last` at done = 1, level at both ends."""
    return last + (first - last) * (1 + math.cos(math.pi * done)) / 2
