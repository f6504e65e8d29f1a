"""Inner optimizers' arrays of replicas that are between two ends of an epoch, as part of a checkpoint.

They differ until the epoch ends (local_steps.py), so a checkpoint holds those of each replica: replica 0's under the
plain names, as of a run without replicas, replica N's as `replica.N.NAME`; `replica_samples` says how many samples of
the epoch each has seen, and last how many all have.

Rules: as many replicas as wrote them take them back exactly. Whoever else goes on gets their mean by samples, which is
what the end of the epoch would have made of them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

REPLICA = "replica."
SAMPLES = "replica_samples"  # (replicas + 1,) float64


def name_of(replica: int, name: str) -> str:
    """Of a replica's array in a checkpoint."""
    return f"{REPLICA}{replica}.{name}" if replica else name


def replicas_in(state: Mapping[str, np.ndarray]) -> int:
    """How many replicas' arrays there are; 0 where they are common."""
    return len(state[SAMPLES]) - 1 if SAMPLES in state else 0


def common(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state with the mean of the replicas' arrays in their place."""
    kept = {name: array for name, array in state.items() if not name.startswith(REPLICA) and name != SAMPLES}
    for replica in range(replicas_in(state)):
        share = np.float32(state[SAMPLES][replica] / state[SAMPLES][-1])
        for name in [key for key in kept if name_of(1, key) in state]:
            part = share * state[name_of(replica, name)]
            kept[name] = kept[name] + part if replica else part
    return kept
