"""Local steps written down plainly: every replica in one process, one after the other, in float64.

What the exchange under test must come to; tests/mpi/programs/local_steps.py runs that one on the same gradients.
"""

import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from worker.data.sharding import share

COUNT = 1_003  # not a multiple of anything
RATE = 0.05


def job_text(settings: dict[str, Any]) -> str:
    """The job whose `sync.local` and optimizer these settings are."""
    return json.dumps(
        {
            "data": {"train": {"built_in": "digits"}},
            "model": [{"dense": {"units": 10}}],
            "loss": "softmax_cross_entropy",
            "optimizer": settings.get("optimizer", "sgd"),
            "sync": {"local": {"steps": settings["steps"], "outer": settings["outer"]}},
        }
    )


def start() -> np.ndarray:
    """The weights everybody begins with."""
    return np.random.default_rng(0).standard_normal(COUNT).astype(np.float32)


def gradient(weights: np.ndarray, step: int, samples: Iterable[int]) -> np.ndarray:
    """The sum over these samples of the gradient of |weights - target|^2 / 2."""
    total = np.zeros(COUNT)
    for sample in samples:
        total += weights - np.random.default_rng([step, sample]).standard_normal(COUNT)
    return total


def train(replicas: list[list[int]], settings: dict[str, Any], momentum: float | None = None) -> np.ndarray:
    """The common weights after the last epoch; `replicas` are the ranks of each, the inner optimizer plain descent.

    Args:
        momentum: of the inner optimizer, whose velocities are averaged at the end of each epoch; None has none.
    """
    world = sum(map(len, replicas))
    ((kind, outer),) = settings["outer"].items()
    rate, mu = outer.get("learning_rate", {"nesterov": 0.7}.get(kind, 1.0)), outer.get("momentum", 0.9)
    common = start().astype(np.float64)
    outer_velocity = np.zeros(COUNT)
    velocities = [np.zeros(COUNT) for _ in replicas]
    step = 0
    for _ in range(settings["epochs"]):
        seen_of_epoch = np.zeros(len(replicas))
        weights, seen, since = [common.copy() for _ in replicas], np.zeros(len(replicas)), 0
        for index, samples in enumerate(settings["batches"]):
            step, since = step + 1, since + 1
            for k, ranks in enumerate(replicas):
                own = [sample for rank in ranks for sample in range(*share(0, samples, rank, world))]
                if not own:
                    continue
                mean = gradient(weights[k], step, own) / len(own)
                velocities[k] = (momentum or 0) * velocities[k] + mean
                weights[k] -= RATE * velocities[k]
                seen[k] += len(own)
            if since < settings["steps"] and index < len(settings["batches"]) - 1:
                continue
            back = sum(n * (common - w) for n, w in zip(seen, weights, strict=True)) / seen.sum()
            if kind == "nesterov":
                outer_velocity = mu * outer_velocity + back
                back = back + mu * outer_velocity
            common -= rate * back
            seen_of_epoch += seen
            weights, seen, since = [common.copy() for _ in replicas], np.zeros(len(replicas)), 0
        mean_velocity = sum(n * v for n, v in zip(seen_of_epoch, velocities, strict=True)) / seen_of_epoch.sum()
        velocities = [mean_velocity.copy() for _ in replicas]
    return common
