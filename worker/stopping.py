"""When training ends and which epoch's weights are kept: decided by the losses so far.

Rules: pure. The validation losses are the same on every rank and ride in the checkpoint, so every rank decides alike
and a resumed run as an uninterrupted one.
"""

from __future__ import annotations

import math
from typing import Any

from protos import job_pb2

DIVERGED = 1e6  # times the loss of the first step, or times 1: what no training comes back from


def bound_of_loss(first_loss: float) -> float:
    """What a step's loss must not exceed, by that of the first step."""
    return DIVERGED * max(first_loss, 1.0)


def has_diverged(loss: float, bound: float) -> bool:
    """Whether training cannot come back from this loss of a step: it is beyond the bound, or not finite."""
    return not (math.isfinite(loss) and loss <= bound)


def why_stop(training: job_pb2.Training, losses: tuple[float, ...]) -> str | None:
    """Why training stops early after these losses, or None where it goes on.

    It stops when `patience` epochs in a row were not below the best by more than `minimum_improvement` (Keras'
    EarlyStopping).
    """
    if not training.HasField("early_stopping"):
        return None
    options = training.early_stopping
    best, best_epoch = math.inf, 0
    for epoch, loss in enumerate(losses, start=1):
        if loss < best - options.minimum_improvement:
            best, best_epoch = loss, epoch
        if epoch - best_epoch >= options.patience:
            where = f"(best {best:.6g} after epoch {best_epoch})" if best_epoch else "(it was never finite)"
            return (
                f"stopped early after epoch {len(losses)}: the validation loss did not improve by more than "
                f"{options.minimum_improvement:g} for {options.patience} epochs {where}"
            )
    return None


def best_epoch(losses: tuple[float, ...]) -> int:
    """The epoch, from 1, of the lowest loss; the earliest of several, 0 where none is finite."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return losses.index(min(finite)) + 1 if finite else 0


def result_of(validations: tuple[dict[str, Any], ...], best: int) -> dict[str, Any]:
    """The evaluation of the weights that are kept: those of epoch `best`, the last where it is 0; empty without any."""
    return validations[best - 1] if validations else {}
