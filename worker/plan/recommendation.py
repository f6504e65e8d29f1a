"""Which choice to take, and why, in one sentence.

Rules: pure. What changes less is preferred while it is within a tenth: exact exchange, or one node, before lossy wire
formats, and all before local steps, which are taken only where all else leaves the step mostly exchange. Among equals
the first offered wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from worker.plan.choices import Change
from worker.plan.prediction import Prediction

TOLERANCE: Final = 1.10
MOSTLY: Final = 0.5  # of a step
CONSEQUENCES: Final = {
    Change.NOTHING: "",
    Change.ROUNDING: " but sends part of each gradient later: validate it",
    Change.COURSE: " but changes the result: validate it",
}


class Recommendation(NamedTuple):
    """What to do."""

    best: Prediction
    sentence: str


def recommend(predictions: Sequence[Prediction], alone: Prediction, nodes: int) -> Recommendation:
    """Of at least one prediction, the first of which is the plain all-reduce.

    Args:
        alone: the same batch on one node.
    """
    plain = predictions[0]
    exact = fastest(predictions, Change.NOTHING) or plain
    lossy = fastest(predictions, Change.ROUNDING)
    local = fastest(predictions, Change.COURSE)
    best = alone if nodes > 1 and alone.step_seconds <= exact.step_seconds else exact
    if lossy is not None and best.step_seconds > TOLERANCE * lossy.step_seconds:
        best = lossy
    left = 1 - best.compute_seconds / best.step_seconds
    if local is not None and left > MOSTLY and best.step_seconds > TOLERANCE * local.step_seconds:
        best = local

    beyond = ""
    if local is not None and best is not local and best.step_seconds > TOLERANCE * local.step_seconds:
        gain = (alone if best is alone else plain).step_seconds / local.step_seconds
        beyond = f" ({local.choice.name} would bring {_times(gain)} but change the result)"
    if best is alone:
        quickest = min((one for one in (exact, lossy) if one is not None), key=lambda one: one.step_seconds)
        if alone.step_seconds <= quickest.step_seconds:
            ratio = _times(quickest.step_seconds / alone.step_seconds)
            told = f"{nodes} nodes take {ratio} its time a step even with {quickest.choice.name}"
        else:
            told = f"{quickest.choice.name} on {nodes} nodes is not faster by a tenth"
        remedy = "a larger batch_size gives each exchange more to compute"
        return Recommendation(alone, f"one node: {told}{beyond}; {remedy}")
    share = 1 - plain.compute_seconds / plain.step_seconds
    if best is plain:
        kept = "shortens" if not beyond else "that keeps the result shortens"
        return Recommendation(
            best, f"all-reduce: the exchange is {share:.0%} of the step, and nothing {kept} it by a tenth{beyond}"
        )
    gain = plain.step_seconds / best.step_seconds
    sentence = f"{best.choice.name}: the exchange is {share:.0%} of the all-reduce's step, this brings {_times(gain)}"
    return Recommendation(best, sentence + CONSEQUENCES[best.choice.change] + beyond)


def fastest(predictions: Sequence[Prediction], change: Change) -> Prediction | None:
    """Of those that change so much, the first offered that is within a tenth of the quickest."""
    offered = [prediction for prediction in predictions if prediction.choice.change is change]
    if not offered:
        return None
    quickest = min(prediction.step_seconds for prediction in offered)
    return next(prediction for prediction in offered if prediction.step_seconds <= TOLERANCE * quickest)


def _times(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio < 10 else f"{ratio:.0f}x"
