"""Every gradient against a central difference along a random direction, in float64, over drawn shapes."""

from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.engine.any_layer import NUMBER, example
from worker.engine.layers import LAYERS
from worker.engine.layers.layer import Moment, Takes, traits_of
from worker.engine.losses import LOSSES

SMOOTH = ["gelu", "silu", "elu:1", "elu:0.4", "softplus"]
ACTIVATIONS = ["sigmoid", "tanh", "relu", "leaky_relu:0.3", "leaky_relu:0", "softmax", *SMOOTH]
SIZES = st.integers(1, 7)
SEEDS = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("kind", LAYERS)
@settings(max_examples=5, deadline=None)
@given(samples=st.integers(2, 5), seed=SEEDS)
def test_every_layer_there_is_passes_on_the_gradient_of_a_difference(engine, difference, kind, samples, seed):
    """A layer between two others, so that its parameters and its input are asked for; tokens have no gradient."""
    word, shape = example(kind)
    takes_tokens = traits_of(LAYERS[kind]).takes is Takes.TOKENS
    before = [] if takes_tokens else [f"{{linear: {{units: {shape[-1]}}}}}"]
    made = engine.build([*before, word, "dense:2"], "mean_squared_error", shape)
    features, targets = engine.draw_batch(made.model, samples, seed)
    if takes_tokens:
        features = np.random.default_rng(seed).integers(0, NUMBER, features.shape).astype(np.float64)
    direction = np.random.default_rng(seed + 1).standard_normal(made.model.parameter_count)
    moment = Moment(seed=3, step=5, first=2)
    made.model.forward(features, targets, moment)
    made.model.backward()
    numeric = difference(lambda: made.model.forward(features, targets, moment).loss, made.parameters, direction)
    assert made.gradient @ direction == pytest.approx(numeric, rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@settings(max_examples=12, deadline=None)
@given(samples=SIZES, shape=st.lists(SIZES, min_size=1, max_size=3), units=SIZES, outputs=st.integers(2, 6), seed=SEEDS)
def test_gradient_equals_the_difference_for_every_activation_and_loss(
    engine, difference, loss, activation, samples, shape, units, outputs, seed
):
    words = [f"dense:{units}", activation, "dense:4", activation, f"dense:{outputs}"]
    made = engine.build(words, loss, tuple(shape))
    features, targets = engine.draw_batch(made.model, samples, seed)
    direction = np.random.default_rng(seed + 1).standard_normal(made.model.parameter_count)

    made.model.forward(features, targets)
    made.model.backward()
    numeric = difference(lambda: made.model.forward(features, targets).loss, made.parameters, direction)
    assert made.gradient @ direction == pytest.approx(numeric, rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu", "leaky_relu:0.3", "softmax", *SMOOTH])
@settings(max_examples=12, deadline=None)
@given(samples=SIZES, units=SIZES, seed=SEEDS)
def test_gradient_through_an_activation_at_the_output_equals_the_difference(
    engine, difference, activation, samples, units, seed
):
    made = engine.build([f"dense:{units}", activation], "mean_squared_error", (3,))
    features, targets = engine.draw_batch(made.model, samples, seed)
    direction = np.random.default_rng(seed + 1).standard_normal(made.model.parameter_count)
    made.model.forward(features, targets)
    made.model.backward()
    numeric = difference(lambda: made.model.forward(features, targets).loss, made.parameters, direction)
    assert made.gradient @ direction == pytest.approx(numeric, rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("word", ["dense:5", "dense: {units: 5, bias: false}", "flatten", *ACTIVATIONS])
@settings(max_examples=15, deadline=None)
@given(samples=SIZES, shape=st.lists(SIZES, min_size=1, max_size=3), seed=SEEDS)
def test_input_gradient_of_each_layer_equals_the_difference(engine, difference, word, samples, shape, seed):
    kind = word.split(":")[0]
    if kind == "softmax":
        shape = [prod(shape)]
    layer = LAYERS[kind](getattr(engine.layer(word), kind), tuple(shape))
    random = np.random.default_rng(seed)
    values = [random.standard_normal(parameter.shape) for parameter in layer.parameters]
    layer.attach(values, [np.empty_like(value) for value in values])
    layer.reserve(samples, np.float64, in_place=False)
    x = random.standard_normal((samples, *shape))
    dy = random.standard_normal((samples, *layer.output_shape))
    direction = random.standard_normal(x.shape)

    layer.forward(x)
    dx = layer.backward_input(dy.copy()).copy()
    assert dx.shape == x.shape
    numeric = difference(lambda: float(np.sum(layer.forward(x) * dy)), x, direction)
    assert np.sum(dx * direction) == pytest.approx(numeric, rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("in_place", [False, True])
@settings(max_examples=15, deadline=None)
@given(samples=SIZES, units=st.integers(2, 6), seed=SEEDS)
def test_delta_of_each_loss_equals_the_difference_in_the_outputs(
    engine, difference, loss, in_place, samples, units, seed
):
    made = engine.make_loss(loss, (units,))
    made.reserve(samples, np.float64, in_place=in_place)
    random = np.random.default_rng(seed)
    outputs = 3 * random.standard_normal((samples, units))
    targets = random.integers(0, units, samples) if loss == "softmax_cross_entropy" else random.random((samples, units))
    direction = random.standard_normal(outputs.shape)

    made.forward(outputs.copy(), targets)
    delta = made.backward().copy()
    numeric = difference(lambda: made.forward(outputs.copy(), targets).loss, outputs, direction)
    assert np.sum(delta * direction) == pytest.approx(numeric, rel=2e-5, abs=1e-6)


def test_relu_and_leaky_relu_take_the_document_s_slope_at_zero(engine):
    """f'(0) is 0 for ReLU and alpha for leaky ReLU: "1 if x > 0 else ..."; no difference can check a kink."""
    for word, slope in (("relu", 0.0), ("leaky_relu:0.3", 0.3)):
        kind = word.split(":")[0]
        layer = LAYERS[kind](getattr(engine.layer(word), kind), (3,))
        layer.reserve(1, np.float64, in_place=False)
        layer.forward(np.array([[0.0, -0.0, 2.0]]))
        assert layer.backward_input(np.ones((1, 3))).tolist() == [[slope, slope, 1.0]]
