"""Label smoothing, class weights, sequences and Huber's delta: against their definitions, written out."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.errors import DataFault, ModelFault

SIZES = st.integers(1, 6)
SEEDS = st.integers(0, 2**32 - 1)


def cross_entropy(logits, labels, smoothing, weights):
    """-sum_j q_j log softmax(z)_j of each row, q_j = w_j ((1 - e) [j = y] + e / k)."""
    k = logits.shape[-1]
    logarithms = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    wanted = np.asarray(weights or np.ones(k)) * ((1 - smoothing) * np.eye(k)[labels] + smoothing / k)
    return -(wanted * logarithms).sum(axis=-1)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("positions", [None, 1, 3])
@settings(max_examples=15, deadline=None)
@given(
    samples=SIZES,
    units=st.integers(2, 6),
    smoothing=st.sampled_from([0.0, 0.1, 0.9]),
    weighted=st.booleans(),
    seed=SEEDS,
)
def test_softmax_cross_entropy_equals_its_definition_and_delta_the_difference(
    engine, difference, in_place, positions, samples, units, smoothing, weighted, seed
):
    random = np.random.default_rng(seed)
    weights = random.uniform(0.1, 3, units).tolist() if weighted else []
    shape = (units,) if positions is None else (positions, units)
    loss = engine.make_loss("softmax_cross_entropy", shape, label_smoothing=smoothing, class_weights=weights)
    loss.reserve(samples, np.float64, in_place=in_place)
    outputs = 3 * random.standard_normal((samples, *shape))
    labels = random.integers(0, units, (samples, *shape[:-1]))

    def total():
        return loss.forward(outputs.copy(), labels).loss

    expected = cross_entropy(outputs, labels, smoothing, weights).sum() / (positions or 1)
    totals = loss.forward(outputs.copy(), labels)
    assert totals.loss == pytest.approx(expected, rel=1e-12)
    assert totals.correct == pytest.approx((outputs.argmax(-1) == labels).sum() / (positions or 1))
    assert totals.samples == samples
    delta = loss.backward().copy()
    assert delta.shape == outputs.shape
    direction = random.standard_normal(outputs.shape)
    assert np.sum(delta * direction) == pytest.approx(difference(total, outputs, direction), rel=2e-5, abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(samples=SIZES, units=SIZES, bend=st.floats(0.05, 4), seed=SEEDS)
def test_huber_equals_its_definition_and_delta_the_difference(engine, difference, samples, units, bend, seed):
    loss = engine.make_loss("huber", (units,), delta=bend)
    loss.reserve(samples, np.float64, in_place=False)
    random = np.random.default_rng(seed)
    outputs, targets = 2 * random.standard_normal((2, samples, units))
    d = np.abs(outputs - targets)
    expected = np.where(d <= bend, d * d / 2, bend * (d - bend / 2)).sum()
    assert loss.forward(outputs.copy(), targets).loss == pytest.approx(expected, rel=1e-12)
    delta, direction = loss.backward().copy(), random.standard_normal(outputs.shape)
    numeric = difference(lambda: loss.forward(outputs.copy(), targets).loss, outputs, direction)
    assert np.sum(delta * direction) == pytest.approx(numeric, rel=2e-5, abs=1e-6)


def test_huber_with_a_large_delta_is_mean_squared_error(engine):
    outputs, targets = np.random.default_rng(0).standard_normal((2, 5, 3))
    huber, squares = engine.make_loss("huber", (3,), delta=1e6), engine.make_loss("mean_squared_error", (3,))
    for loss in (huber, squares):
        loss.reserve(5, np.float64, in_place=False)
    assert huber.forward(outputs, targets).loss == pytest.approx(squares.forward(outputs, targets).loss, rel=1e-12)
    np.testing.assert_allclose(huber.backward(), squares.backward())


def test_any_split_of_a_batch_adds_up_to_the_same_weighted_loss(engine):
    """What ranks do: the sums of their shares are the sum of the whole, whichever labels meet in a share."""
    random = np.random.default_rng(1)
    outputs, labels = random.standard_normal((12, 4)), random.integers(0, 4, 12)
    loss = engine.make_loss("softmax_cross_entropy", (4,), class_weights=[5, 0, 1, 0.5], label_smoothing=0.1)
    loss.reserve(12, np.float64, in_place=False)
    whole = loss.forward(outputs, labels).loss
    for cut in range(1, 12):
        parts = loss.forward(outputs[:cut], labels[:cut]).loss + loss.forward(outputs[cut:], labels[cut:]).loss
        assert parts == pytest.approx(whole, rel=1e-12)


def test_predictions_of_sequences_are_probabilities_at_each_position(engine):
    loss = engine.make_loss("softmax_cross_entropy", (2, 3))
    outputs = np.random.default_rng(2).standard_normal((4, 2, 3))
    expected = np.exp(outputs) / np.exp(outputs).sum(axis=2, keepdims=True)
    loss.predict(outputs)
    np.testing.assert_allclose(outputs, expected)


def test_targets_of_sequences_must_fit_the_positions_and_the_outputs(engine):
    loss = engine.make_loss("softmax_cross_entropy", (2, 3))
    loss.check_targets(np.array([[0, 2], [1, 1]]), "train.npz")
    with pytest.raises(DataFault, match=re.escape("label 3 of sample 1, position 0 is not among 0 to 2")):
        loss.check_targets(np.array([[0, 2], [3, 1]]), "train.npz")
    with pytest.raises(DataFault, match="needs 2 labels a sample"):
        loss.check_targets(np.array([0, 1]), "train.npz")


@pytest.mark.parametrize(
    ("shape", "weights", "message"),
    [
        ((3,), [1, 2], "class_weights: are 2, but the model has 3 outputs"),
        ((3,), [0, 0, 0], "class_weights: are all 0"),
        ((2, 3, 4), [], "got outputs of shape (2, 3, 4)"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(engine, shape, weights, message):
    with pytest.raises(ModelFault, match=re.escape(message)):
        engine.make_loss("softmax_cross_entropy", shape, class_weights=weights)


@pytest.mark.oracle
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_equals_torch_s_sum_and_its_mean_after_the_stated_conversion(engine, smoothing, weighted):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make test-oracle installs and runs it")
    random = np.random.default_rng(3)
    outputs, labels = 3 * random.standard_normal((20, 5)), random.integers(0, 5, 20)
    weights = random.uniform(0.1, 3, 5) if weighted else np.ones(5)
    theirs = torch.tensor(outputs, requires_grad=True)
    options = {"weight": torch.tensor(weights), "label_smoothing": smoothing}
    peer = torch.nn.functional.cross_entropy(theirs, torch.tensor(labels), **options, reduction="sum")
    peer.backward()
    mean = torch.nn.functional.cross_entropy(theirs, torch.tensor(labels), **options)

    loss = engine.make_loss(
        "softmax_cross_entropy", (5,), label_smoothing=smoothing, class_weights=weights.tolist() if weighted else []
    )
    loss.reserve(20, np.float64, in_place=False)
    ours = loss.forward(outputs.copy(), labels).loss
    assert ours == pytest.approx(peer.item(), rel=1e-12)
    assert ours / 20 * (20 / weights[labels].sum()) == pytest.approx(mean.item(), rel=1e-12)
    np.testing.assert_allclose(loss.backward(), theirs.grad.numpy(), rtol=1e-10, atol=1e-13)
