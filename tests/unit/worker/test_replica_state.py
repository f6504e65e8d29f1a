"""Replicas' optimizer arrays in a checkpoint: their mean by samples is what others go on with."""

import numpy as np

from worker.sync.replica_state import SAMPLES, common, name_of, replicas_in


def array(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_the_mean_counts_each_replica_by_its_samples_and_leaves_what_is_common_alone() -> None:
    state = {
        "velocity": array(4, 0),
        name_of(1, "velocity"): array(0, 8),
        "outer.velocity": array(1, 2),
        SAMPLES: np.array([30.0, 10.0, 40.0]),
    }
    assert replicas_in(state) == 2
    assert {name: found.tolist() for name, found in common(state).items()} == {
        "velocity": [3.0, 2.0],
        "outer.velocity": [1.0, 2.0],
    }


def test_a_state_of_no_replicas_stays_as_it_is() -> None:
    state = {"first_moment": array(1), "residual.0": array(2)}
    assert replicas_in(state) == 0
    assert common(state) == state
