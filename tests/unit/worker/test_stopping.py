"""Early stopping and the best epoch, decided by the losses so far."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import job_pb2
from worker.stopping import best_epoch, result_of, why_stop


def patient(patience: int, minimum_improvement: float = 0.0) -> job_pb2.Training:
    options = job_pb2.EarlyStopping(patience=patience, minimum_improvement=minimum_improvement)
    return job_pb2.Training(early_stopping=options)


def test_without_early_stopping_nothing_stops_training() -> None:
    assert why_stop(job_pb2.Training(), (1.0, 2.0, 3.0, 4.0)) is None


def test_it_stops_after_as_many_epochs_without_improvement_as_its_patience() -> None:
    assert why_stop(patient(2), ()) is None
    assert why_stop(patient(2), (1.0, 0.5, 0.6)) is None
    assert why_stop(patient(2), (1.0, 0.5, 0.6, 0.5)) == (
        "stopped early after epoch 4: the validation loss did not improve by more than 0 for 2 epochs "
        "(best 0.5 after epoch 2)"
    )
    assert why_stop(patient(1, 0.1), (1.0, 0.95)) is not None
    assert why_stop(patient(2, 0.1), (1.0, 0.95, 0.89)) is None
    assert why_stop(patient(2), (math.nan, math.nan)) is not None


@given(losses=st.lists(st.floats(0, 10), max_size=12), patience=st.integers(1, 4))
def test_once_it_has_stopped_a_resumed_run_stays_stopped(losses: list[float], patience: int) -> None:
    """Keras' EarlyStopping, transcribed: a counter that a better loss resets."""
    best, waited, stopped = math.inf, 0, False
    for loss in losses:
        waited = 0 if loss < best else waited + 1
        best = min(best, loss)
        stopped = stopped or waited >= patience
    assert (why_stop(patient(patience), tuple(losses)) is not None) == stopped


def test_the_best_epoch_is_the_first_of_the_lowest_finite_losses() -> None:
    assert best_epoch(()) == 0
    assert best_epoch((math.nan, math.inf)) == 0
    assert best_epoch((math.nan, 0.5, 0.4, 0.4, math.nan)) == 3


def test_the_result_is_that_of_the_weights_that_are_kept() -> None:
    validations = ({"validation_loss": 1.0}, {"validation_loss": 2.0})
    assert result_of((), 0) == {}
    assert result_of(validations, 0) == {"validation_loss": 2.0}
    assert result_of(validations, 1) == pytest.approx({"validation_loss": 1.0})
