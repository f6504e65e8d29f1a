"""The layers of sequences and of deep networks, each by itself: gradients, shapes, refusals."""

import itertools
import re
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos import job_pb2
from worker.engine.layers import LAYERS, attention
from worker.engine.layers.layer import Moment
from worker.errors import DataFault, ModelFault

SIZES = st.integers(1, 6)
SEEDS = st.integers(0, 2**32 - 1)


def dense(units):
    return job_pb2.Layer(linear=job_pb2.LinearLayer(units=units))


def residual(*layers):
    return job_pb2.ResidualLayer(layers=layers)


def make(kind, options, shape, samples, random, in_place=False):
    """A layer with random parameters and gradients full of nan, so that whatever is not written shows."""
    layer = LAYERS[kind](options, shape)
    layer.attach(
        [random.standard_normal(parameter.shape) for parameter in layer.parameters],
        [np.full(parameter.shape, np.nan) for parameter in layer.parameters],
    )
    layer.reserve(samples, np.float64, in_place)
    return layer


def values_and_gradients(kind, layer):
    """The arrays a layer was attached to, whatever it calls them."""
    if kind == "residual":
        return [pair for placed in layer.inside.layers for pair in values_and_gradients(placed.kind, placed.layer)]
    names = [parameter.name for parameter in layer.parameters]
    return [(getattr(layer, name), getattr(layer, f"d_{name}")) for name in names]


def check_gradients(difference, kind, options, shape, samples, seed, in_place=False):
    """<grad, direction> against a central difference, for the input and for each parameter."""
    random = np.random.default_rng(seed)
    layer = make(kind, options, shape, samples, random, in_place)
    if hasattr(layer, "begin"):
        layer.begin(Moment(seed=3, step=5, first=2))
    x = random.standard_normal((samples, *shape))
    dy = random.standard_normal((samples, *layer.output_shape))

    def loss():
        return float(np.sum(layer.forward(x.copy()) * dy))

    layer.forward(x.copy())
    kept = x.copy()
    layer.forward(kept)
    if layer.parameters:
        layer.backward_parameters(dy)
    gradients = [(value, gradient.copy()) for value, gradient in values_and_gradients(kind, layer)]
    dx = layer.backward_input(dy.copy()).copy()
    assert dx.shape == x.shape
    for array, gradient in [(x, dx), *gradients]:
        direction = random.standard_normal(array.shape)
        numeric = difference(loss, array, direction)
        assert np.sum(gradient * direction) == pytest.approx(numeric, rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("in_place", [False, True])
@settings(max_examples=20, deadline=None)
@given(samples=SIZES, lead=st.lists(SIZES, max_size=2), units=st.integers(2, 6), seed=SEEDS)
def test_layer_norm_gradients_equal_the_difference(difference, in_place, samples, lead, units, seed):
    options = job_pb2.LayerNormLayer(epsilon=0.1)
    check_gradients(difference, "layer_norm", options, (*lead, units), samples, seed, in_place)


@settings(max_examples=20, deadline=None)
@given(samples=SIZES, lead=st.lists(SIZES, max_size=2), inputs=SIZES, units=SIZES, seed=SEEDS)
def test_linear_gradients_equal_the_difference(difference, samples, lead, inputs, units, seed):
    check_gradients(difference, "linear", job_pb2.LinearLayer(units=units), (*lead, inputs), samples, seed)


@settings(max_examples=15, deadline=None)
@given(samples=SIZES, time=SIZES, features=SIZES, seed=SEEDS)
def test_positions_gradients_equal_the_difference(difference, samples, time, features, seed):
    check_gradients(difference, "positions", job_pb2.PositionsLayer(), (time, features), samples, seed)


@pytest.mark.parametrize(("causal", "queries"), [(False, 32), (True, 32), (True, 2)])
@settings(max_examples=20, deadline=None)
@given(samples=st.integers(1, 3), time=SIZES, heads=st.integers(1, 3), width=st.integers(1, 4), seed=SEEDS)
def test_attention_gradients_equal_the_difference(difference, causal, queries, samples, time, heads, width, seed):
    options = job_pb2.AttentionLayer(heads=heads, causal=causal)
    with patch.multiple(attention, BLOCK_QUERIES=queries, SCORE_ELEMENTS=40):
        check_gradients(difference, "attention", options, (time, heads * width), samples, seed)


@settings(max_examples=20, deadline=None)
@given(samples=SIZES, shape=st.lists(SIZES, min_size=1, max_size=3), rate=st.floats(0, 0.9), seed=SEEDS)
def test_dropout_gradients_equal_the_difference(difference, samples, shape, rate, seed):
    check_gradients(difference, "dropout", job_pb2.DropoutLayer(rate=rate), tuple(shape), samples, seed)


TANH = job_pb2.Layer(tanh=job_pb2.TanhLayer())
NORM = job_pb2.Layer(layer_norm=job_pb2.LayerNormLayer(epsilon=0.1))
HALF = job_pb2.Layer(dropout=job_pb2.DropoutLayer(rate=0.5))


@pytest.mark.parametrize(
    "layers",
    [
        [dense(4)],
        [TANH],  # nothing trained
        [TANH, dense(4), TANH],  # something before the first trained layer
        [NORM, dense(7), TANH, HALF, dense(4)],
        [dense(4), job_pb2.Layer(residual=residual(NORM, dense(4)))],
    ],
)
@settings(max_examples=8, deadline=None)
@given(samples=SIZES, time=SIZES, seed=SEEDS)
def test_residual_gradients_equal_the_difference(difference, layers, samples, time, seed):
    check_gradients(difference, "residual", residual(*layers), (time, 4), samples, seed)


@settings(max_examples=30, deadline=None)
@given(samples=SIZES, tokens=SIZES, vocabulary=SIZES, units=SIZES, seed=SEEDS)
def test_embedding_takes_rows_and_adds_gradients_up_by_token(samples, tokens, vocabulary, units, seed):
    random = np.random.default_rng(seed)
    layer = make("embedding", job_pb2.EmbeddingLayer(vocabulary=vocabulary, units=units), (tokens,), samples, random)
    x = random.integers(0, vocabulary, (samples, tokens))
    np.testing.assert_array_equal(layer.forward(x.astype(np.float64)), layer.weight[x])
    dy = random.standard_normal((samples, tokens, units))
    expected = np.zeros((vocabulary, units))
    np.add.at(expected, x, dy)
    layer.backward_parameters(dy)
    np.testing.assert_allclose(layer.d_weight, expected, rtol=1e-13, atol=1e-13)
    first = layer.d_weight.copy()
    layer.backward_parameters(dy)
    np.testing.assert_array_equal(layer.d_weight, first)


@pytest.mark.parametrize(("value", "shown"), [(-1, "-1"), (5, "5"), (2.5, "2.5"), (np.nan, "nan"), (1e30, "1e+30")])
def test_what_is_not_a_token_is_refused_by_value(value, shown):
    options = job_pb2.EmbeddingLayer(vocabulary=5, units=2)
    layer = make("embedding", options, (3,), 2, np.random.default_rng(1))
    x = np.array([[0.0, 4.0, 1.0], [2.0, value, 3.0]])
    message = f"a sample has {shown} where a token is expected, a whole number from 0 to 4"
    with pytest.raises(DataFault, match=re.escape(message)):
        layer.forward(x)


def test_a_causal_position_sees_nothing_behind_it():
    random = np.random.default_rng(1)
    layer = make("attention", job_pb2.AttentionLayer(heads=2, causal=True), (6, 4), 1, random)
    x = random.standard_normal((1, 6, 4))
    before = layer.forward(x).copy()
    x[:, 3:] += 1
    after = layer.forward(x)
    np.testing.assert_array_equal(after[:, :3], before[:, :3])
    assert (after[:, 3:] != before[:, 3:]).all()


def test_attention_of_enormous_scores_is_that_of_their_differences():
    """Scores in the thousands: e^S would overflow, and all of a row be 0 where the largest score is far below 0."""
    random = np.random.default_rng(3)
    layer = make("attention", job_pb2.AttentionLayer(heads=1, causal=True), (40, 2), 3, random)
    x = 100 * random.standard_normal((3, 40, 2))
    q, k, v = np.moveaxis((x @ layer.in_weight + layer.in_bias).reshape(3, 40, 3, 2), 2, 0)
    scores = q @ k.swapaxes(1, 2) / np.sqrt(2)
    scores[:, *np.triu_indices(40, 1)] = -np.inf
    assert scores[:, 0].max(axis=1).min() < -1000
    assert scores.max() > 1000
    e = np.exp(scores - scores.max(axis=2, keepdims=True))
    wanted = e / e.sum(axis=2, keepdims=True) @ v @ layer.out_weight + layer.out_bias
    np.testing.assert_allclose(layer.forward(x), wanted, rtol=1e-9, atol=1e-9)


def test_dropout_keeps_its_share_and_does_nothing_in_evaluation():
    layer = LAYERS["dropout"](job_pb2.DropoutLayer(rate=0.25), (101,))
    layer.reserve(2000, np.float64, in_place=False)
    x = np.ones((2000, 101))
    layer.begin(Moment(seed=1, step=1, first=0))
    y = layer.forward(x)
    assert set(np.unique(y)) == {0.0, 4 / 3}
    assert y.mean() == pytest.approx(1, abs=0.01)
    assert np.abs(np.corrcoef(y.T) - np.eye(101)).max() < 0.15
    layer.begin(None)
    np.testing.assert_array_equal(layer.forward(x), x)


@settings(max_examples=30, deadline=None)
@given(samples=st.integers(1, 9), width=st.integers(1, 9), world=st.integers(1, 4), seed=SEEDS, step=st.integers(1, 99))
def test_a_mask_is_the_same_for_any_number_of_ranks(samples, width, world, seed, step):
    layer = LAYERS["dropout"](job_pb2.DropoutLayer(rate=0.5), (width,))
    layer.reserve(samples, np.float64, in_place=False)

    def mask(first, count):
        layer.begin(Moment(seed, step, first, (2,)))
        return layer.forward(np.ones((count, width))).copy()

    bounds = [samples * rank // world for rank in range(world + 1)]
    parts = [mask(low, high - low) for low, high in itertools.pairwise(bounds) if high > low]
    np.testing.assert_array_equal(np.concatenate(parts), mask(0, samples))


def test_masks_differ_by_seed_step_layer_and_sample():
    layer = LAYERS["dropout"](job_pb2.DropoutLayer(rate=0.5), (64,))
    layer.reserve(1, np.float64, in_place=False)
    masks = set()
    for moment in (
        Moment(1, 1, 0, (0,)),
        Moment(2, 1, 0, (0,)),
        Moment(1, 2, 0, (0,)),
        Moment(1, 1, 1, (0,)),
        Moment(1, 1, 0, (1,)),
        Moment(1, 1, 0, (1, 0)),
    ):
        layer.begin(moment)
        masks.add(layer.forward(np.ones((1, 64))).tobytes())
    assert len(masks) == 6


@pytest.mark.parametrize(
    ("kind", "options", "shape", "message"),
    [
        ("layer_norm", job_pb2.LayerNormLayer(), (4,), "epsilon: is absent"),
        ("layer_norm", job_pb2.LayerNormLayer(epsilon=1e-5), (0,), "which hold no values"),
        ("linear", job_pb2.LinearLayer(), (4,), "units: 0 is not at least 1"),
        ("linear", job_pb2.LinearLayer(units=2), (3, 0), "which hold no values"),
        ("positions", job_pb2.PositionsLayer(), (4,), "got samples of shape (4,), needs (time, features)"),
        ("attention", job_pb2.AttentionLayer(heads=1), (4,), "got samples of shape (4,), needs (time, features)"),
        ("attention", job_pb2.AttentionLayer(heads=3), (5, 4), "heads: 3 does not divide the 4 features"),
        ("dropout", job_pb2.DropoutLayer(), (4,), "rate: is absent"),
        ("dropout", job_pb2.DropoutLayer(rate=0.999999), (4,), "rate: 0.999999 is so near 1"),
        ("embedding", job_pb2.EmbeddingLayer(units=2), (4,), "vocabulary: 0 is not at least 1"),
        ("embedding", job_pb2.EmbeddingLayer(vocabulary=2, units=2), (0,), "which hold no values"),
        ("residual", residual(dense(5)), (3, 4), "got samples of shape (3, 4), and its layers make (3, 5)"),
        ("residual", residual(TANH, dense(0)), (4,), "layers[1].linear: units: 0"),
        ("residual", residual(), (4,), "layers: has no layers"),
    ],
)
def test_what_does_not_fit_is_refused(kind, options, shape, message):
    with pytest.raises(ModelFault, match=re.escape(message)):
        LAYERS[kind](options, shape)
