"""Losses where they are hard: extreme logits, ties, targets that do not fit."""

import re

import numpy as np
import pytest

from protos import job_pb2
from protos.rules import resolve
from worker.engine.losses import LOSSES, TARGET_KIND
from worker.errors import DataFault, ModelFault


def options_of(kind):
    """A loss's settings in a resolved job."""
    job = job_pb2.JobSpec()
    getattr(job.loss, kind).SetInParent()
    return getattr(resolve(job).loss, kind)


def make(kind, units, samples=8, dtype=np.float32):
    """A loss with its buffers."""
    loss = LOSSES[kind](options_of(kind), (units,))
    loss.reserve(samples, dtype, in_place=False)
    return loss


def test_every_loss_says_what_targets_it_takes():
    assert set(TARGET_KIND) == set(LOSSES)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_softmax_cross_entropy_is_exact_for_logits_of_ten_thousand(dtype):
    """Rows (1e4, 0, -1e4) and labels 0, 1, 2: -log softmax is 0, 1e4 and 2e4 to every digit, as e^-1e4 is 0."""
    loss = make("softmax_cross_entropy", 3, dtype=dtype)
    logits = np.array([[1e4, 0.0, -1e4]] * 3, dtype)
    assert loss.forward(logits, np.array([0, 1, 2])) == (30000.0, 1.0, 3)
    assert loss.backward().tolist() == [[0.0, 0.0, 0.0], [1.0, -1.0, 0.0], [1.0, 0.0, -1.0]]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_binary_cross_entropy_is_exact_for_logits_of_ten_thousand(dtype):
    """z = 1e4: -log s = log(1 + e^-1e4) = 0 and -log(1 - s) = 1e4; mirrored for -1e4; half of it for y = 1/2."""
    loss = make("binary_cross_entropy", 1, dtype=dtype)
    for z, y, expected, delta in [
        (1e4, 1.0, 0.0, 0.0),
        (1e4, 0.0, 1e4, 1.0),
        (-1e4, 1.0, 1e4, -1.0),
        (-1e4, 0.0, 0.0, 0.0),
        (1e4, 0.5, 5e3, 0.5),
        (-1e4, 0.5, 5e3, -0.5),
    ]:
        assert loss.forward(np.array([[z]], dtype), np.array([[y]], dtype)).loss == expected
        assert loss.backward().tolist() == [[delta]]


@pytest.mark.parametrize("size", [1e4, 88.0, 30.0, 1.0, 1e-4])
def test_cross_entropies_of_float32_logits_match_float64_of_any_size(size):
    """The small loss of a sure answer keeps its digits: at z = 30 it is e^-30 = 9e-14, not 0."""
    random = np.random.default_rng(2)
    logits = (size * random.uniform(-1, 1, (8, 4))).astype(np.float32)
    targets = random.random((8, 4)).astype(np.float32)
    labels = random.integers(0, 4, 8)
    for kind, wanted in (("binary_cross_entropy", targets), ("softmax_cross_entropy", labels)):
        single, double = make(kind, 4), make(kind, 4, dtype=np.float64)
        expected = double.forward(logits.astype(np.float64), wanted)
        assert single.forward(logits.copy(), wanted).loss == pytest.approx(expected.loss, rel=1e-6)
        np.testing.assert_allclose(single.backward(), double.backward(), rtol=2e-6, atol=1e-7)
    sure = make("binary_cross_entropy", 1).forward(np.array([[30.0]], np.float32), np.array([[1.0]], np.float32))
    assert sure.loss == pytest.approx(np.log1p(np.exp(-30.0)), rel=1e-6)


def test_predictions_are_finite_for_extreme_logits(engine):
    for kind, expected in (("binary_cross_entropy", [1.0, 0.0]), ("softmax_cross_entropy", [1.0, 0.0])):
        made = engine.build(["dense:2"], kind, (1,), np.float32)
        made.parameters[:] = [1e4, -1e4, 0, 0]
        assert made.model.outputs(np.ones((1, 1), np.float32)).tolist() == [expected]


def test_a_tie_counts_as_right_only_for_the_first_class():
    """A model that puts out the same for every class has learned nothing; it must not look perfect."""
    totals = make("softmax_cross_entropy", 4).forward(np.zeros((4, 4), np.float32), np.arange(4))
    assert totals.correct == 1


def test_correct_counts_right_labels_and_shares_of_them(engine):
    labels = make("softmax_cross_entropy", 2).forward(
        np.array([[2, 1], [0, 1], [3, 0]], np.float32), np.array([0, 1, 1])
    )
    assert (labels.correct, labels.samples) == (2.0, 3)
    flags = make("binary_cross_entropy", 2).forward(
        np.array([[2, -1], [-1, -1]], np.float32), np.array([[1, 0], [1, 0]], np.float32)
    )
    assert flags.correct == 1.5
    assert np.isnan(make("mean_squared_error", 1).forward(np.ones((1, 1)), np.ones((1, 1))).correct)


@pytest.mark.parametrize(
    ("kind", "targets", "message"),
    [
        ("softmax_cross_entropy", np.array([0, 3, 1]), "train.npz: label 3 of sample 1 is not among 0 to 2"),
        ("softmax_cross_entropy", np.array([0, -1]), "label -1 of sample 1 is not among 0 to 2"),
        ("softmax_cross_entropy", np.array([[0, 1, 2]]), "needs one label a sample: give class numbers"),
        ("softmax_cross_entropy", np.array([0.0, 1.0]), "targets are float64"),
        ("mean_squared_error", np.zeros((4, 2)), "2 target values a sample, but the model has 3 outputs"),
        ("mean_squared_error", np.array([[0, 0, 0], [0, np.inf, 0]]), "target of sample 1 is not a finite number"),
        ("binary_cross_entropy", np.array([[0, 1, 1], [0, 0, 1.5]]), "sample 1 has a target outside 0 to 1"),
        ("binary_cross_entropy", np.array([0.0, 1.0]), "3 outputs"),
    ],
)
def test_targets_that_cannot_belong_to_the_outputs_are_named(kind, targets, message):
    with pytest.raises(DataFault, match=re.escape(message)):
        make(kind, 3).check_targets(targets, "train.npz")


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("softmax_cross_entropy", np.array([0, 2, 1])),
        ("softmax_cross_entropy", np.array([], np.int64)),
        ("mean_squared_error", np.array([[1e9, -1e9, 0]])),
        ("binary_cross_entropy", np.array([[0, 1, 0.5]])),
        ("binary_cross_entropy", np.empty((0, 3))),
    ],
)
def test_targets_that_fit_pass(kind, targets):
    make(kind, 3).check_targets(targets, "train.npz")


def test_a_loss_that_does_not_fit_the_outputs_is_refused():
    with pytest.raises(ModelFault, match="got 1 output, needs one for each class"):
        make("softmax_cross_entropy", 1)
    with pytest.raises(ModelFault, match=re.escape("got outputs of shape (2, 3)")):
        LOSSES["mean_squared_error"](options_of("mean_squared_error"), (2, 3))
