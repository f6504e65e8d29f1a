"""Batch normalization by itself: gradients, ranks that share a batch, ranks without samples, lone values, its state."""

import itertools
import re
import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos import job_pb2
from tests.unit.engine.any_layer import NUMBER, example, from_text
from worker.engine.layers import LAYERS
from worker.engine.layers.layer import Moment, Takes, traits_of
from worker.engine.model import Model
from worker.errors import ModelFault

SIZES = st.integers(1, 6)
SEEDS = st.integers(0, 2**32 - 1)
SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3)
LOSS = job_pb2.Loss(softmax_cross_entropy=job_pb2.SoftmaxCrossEntropyLoss())
MOMENT = Moment(seed=1, step=1, first=0)


def options(synchronized=False, momentum=0.1, epsilon=0.1):
    return job_pb2.BatchNormLayer(momentum=momentum, epsilon=epsilon, synchronized=synchronized)


def make(shape, samples, random, dtype=np.float64, reduce=None, block=3, **settings):
    """A layer with random parameters, its running mean somewhere, and gradients full of nan; blocks of few rows."""
    layer = LAYERS["batch_norm"](options(**settings), tuple(shape))
    layer.block = block or layer.block
    values = [random.standard_normal(parameter.shape).astype(dtype) for parameter in layer.parameters]
    layer.attach(values, [np.full_like(value, np.nan) for value in values])
    state = [random.random(array.shape).astype(dtype) + 0.5 for array in layer.state]
    layer.attach_state(state, np.zeros(layer.sum_count), reduce or (lambda sums: None))
    layer.reserve(samples, dtype, in_place=False)
    layer.begin(MOMENT)
    return layer


def layer_of(kind, **settings):
    message = job_pb2.Layer()
    getattr(message, kind).SetInParent()
    for name, value in settings.items():
        setattr(getattr(message, kind), name, value)
    return message


def norm(synchronized=False):
    return job_pb2.Layer(batch_norm=options(synchronized))


class Ranks:
    """Threads as ranks: `reduce` adds up over all that call it, in rank order, and is given up when one fails."""

    def __init__(self, size):
        self.barrier = threading.Barrier(size, timeout=20)
        self.parts = [None] * size

    def reduce_of(self, rank):
        def reduce(sums):
            self.parts[rank] = sums.copy()
            self.barrier.wait()
            sums[...] = np.sum(self.parts, axis=0)
            self.barrier.wait()

        return reduce

    def run(self, act):
        results, faults = [None] * len(self.parts), []

        def of(rank):
            try:
                results[rank] = act(rank)
            except BaseException as fault:
                faults.append(fault)
                self.barrier.abort()

        threads = [threading.Thread(target=of, args=(rank,)) for rank in range(len(self.parts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        if faults:
            raise faults[0]
        return results


@pytest.mark.parametrize("training", [True, False])
@settings(max_examples=30, deadline=None)
@given(samples=SIZES, shape=SHAPES, seed=SEEDS)
def test_gradients_equal_the_difference(difference, training, samples, shape, seed):
    random = np.random.default_rng(seed)
    layer = make(shape, samples, random)
    layer.begin(MOMENT if training else None)
    x = 3 * random.standard_normal((samples, *shape)) + 2
    dy = random.standard_normal(x.shape)
    layer.forward(x)
    layer.backward_parameters(dy)
    gradients = [layer.d_weight.copy(), layer.d_bias.copy(), layer.backward_input(dy.copy())]

    def loss():
        return float(np.sum(layer.forward(x) * dy))

    for array, gradient in zip([layer.weight, layer.bias, x], gradients, strict=True):
        direction = random.standard_normal(array.shape)
        assert np.sum(gradient * direction) == pytest.approx(difference(loss, array, direction), rel=2e-5, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 12), min_size=1, max_size=3), shape=SHAPES, seed=SEEDS)
def test_synchronized_ranks_do_what_one_does_however_the_batch_is_shared(cuts, shape, seed):
    edges = [0, *sorted(cuts), 12]
    random = np.random.default_rng(seed)
    x, dy = 5 + random.standard_normal((12, *shape)), random.standard_normal((12, *shape))

    def step(low, high, reduce=None):
        layer = make(shape, 12, np.random.default_rng(seed), reduce=reduce, synchronized=True)
        y = layer.forward(x[low:high]).copy()
        layer.backward_parameters(dy[low:high])
        gradients = [layer.d_weight.copy(), layer.d_bias.copy()]
        dx = layer.backward_input(dy[low:high].copy())
        layer.update_state()
        return y, dx, gradients, [layer.running_mean, layer.running_variance]

    y, dx, gradients, state = step(0, 12)
    ranks = Ranks(len(edges) - 1)
    parts = ranks.run(lambda rank: step(edges[rank], edges[rank + 1], ranks.reduce_of(rank)))
    np.testing.assert_allclose(np.concatenate([part[0] for part in parts]), y, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(np.concatenate([part[1] for part in parts]), dx, rtol=1e-9, atol=1e-12)
    for which in (0, 1):
        total = sum(part[2][which] for part in parts)
        np.testing.assert_allclose(total, gradients[which], rtol=1e-10, atol=1e-12)
        for part in parts:
            np.testing.assert_allclose(part[3][which], state[which], rtol=1e-12)
            np.testing.assert_array_equal(part[3][which], parts[0][3][which])


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(0, 9), shape=SHAPES, seed=SEEDS)
def test_sums_of_pieces_and_ranks_add_up_to_the_running_statistics_of_the_whole(cut, shape, seed):
    x = 100 + np.random.default_rng(seed).standard_normal((9, *shape))
    whole, parts = (make(shape, 9, np.random.default_rng(seed)) for _ in range(2))
    whole.forward(x)
    for piece in (x[:cut], x[cut:]):
        if len(piece):
            parts.forward(piece)
    for layer in (whole, parts):
        layer.update_state()
        assert not layer.sums.any()
    np.testing.assert_allclose(parts.running_mean, whole.running_mean, rtol=1e-12)
    np.testing.assert_allclose(parts.running_variance, whole.running_variance, rtol=1e-9)


@pytest.mark.parametrize(("center", "scale"), [(0, 1), (1e3, 1), (-1e4, 0.5), (1e-6, 1e-8)])
def test_values_far_from_zero_keep_their_variance_in_float32(center, scale):
    """Against float64 on the values as float32 holds them; more blocks than one, and no multiple of a block."""
    random = np.random.default_rng(1)
    x = (center + scale * random.standard_normal((301, 23, 17))).astype(np.float32)
    layer = make((23, 17), 301, random, np.float32, block=None, momentum=1.0, epsilon=1e-5)
    layer.running_mean[...] = 0
    layer.forward(x)
    layer.update_state()
    exact = x.astype(np.float64).reshape(-1, 17)
    np.testing.assert_allclose(layer.running_mean, exact.mean(axis=0), rtol=1e-6, atol=1e-6 * scale)
    np.testing.assert_allclose(layer.running_variance, exact.var(axis=0, ddof=1), rtol=1e-5)


@pytest.mark.parametrize("synchronized", [False, True])
def test_a_lone_value_puts_out_the_bias_passes_no_gradient_and_leaves_the_state(synchronized):
    layer = make((3,), 1, np.random.default_rng(1), synchronized=synchronized)
    before = layer.running_mean.copy(), layer.running_variance.copy()
    np.testing.assert_allclose(layer.forward(np.array([[7.0, -2.0, 0.1]])), layer.bias[None], rtol=1e-12)
    layer.backward_parameters(np.ones((1, 3)))
    np.testing.assert_allclose(layer.d_weight, 0, atol=1e-12)
    np.testing.assert_allclose(layer.backward_input(np.ones((1, 3))), 0, atol=1e-12)
    layer.update_state()
    np.testing.assert_array_equal((layer.running_mean, layer.running_variance), before)


def test_a_value_whose_square_overflows_shows_as_not_a_number():
    layer = make((2,), 3, np.random.default_rng(1), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        y = layer.forward(np.array([[1e30, 0], [-1e30, 1], [0, 2]], np.float32))
    assert np.isnan(y[:, 0]).all()
    assert np.isfinite(y[:, 1]).all()


def test_evaluation_takes_the_running_statistics_and_leaves_no_sums():
    layer = make((3,), 5, np.random.default_rng(1))
    layer.begin(None)
    x = np.random.default_rng(2).standard_normal((5, 3))
    expected = (x - layer.running_mean) / np.sqrt(layer.running_variance + 0.1) * layer.weight + layer.bias
    np.testing.assert_allclose(layer.forward(x), expected, rtol=1e-12)
    assert not layer.sums.any()


@pytest.mark.parametrize(
    ("given", "shape", "message"),
    [
        (job_pb2.BatchNormLayer(epsilon=1, synchronized=True), (4,), "momentum: is absent"),
        (job_pb2.BatchNormLayer(momentum=0.1, synchronized=True), (4,), "epsilon: is absent"),
        (job_pb2.BatchNormLayer(momentum=0.1, epsilon=1), (4,), "synchronized: is absent"),
        (options(), (3, 0), "got samples of shape (3, 0), which hold no values"),
    ],
)
def test_what_does_not_fit_is_refused(given, shape, message):
    with pytest.raises(ModelFault, match=re.escape(message)):
        LAYERS["batch_norm"](given, shape)


def residual(*layers):
    return job_pb2.Layer(residual=job_pb2.ResidualLayer(layers=layers))


INSIDE = residual(norm(), layer_of("linear", units=4), norm(synchronized=True))


def build(layers, shape, dtype=np.float64, **attached):
    model = Model(layers, LOSS, shape, dtype)
    parameters, gradient = np.zeros(model.parameter_count, dtype), np.full(model.parameter_count, np.nan, dtype)
    model.attach(parameters, gradient, **attached)
    model.initialize(3)
    return model, parameters, gradient


def test_state_is_named_by_the_way_to_it_and_begins_at_mean_0_and_variance_1():
    model, parameters, _ = build([norm(), INSIDE, layer_of("dense", units=3, bias=True)], (4,))
    assert [(slot.name, slot.shape) for slot in model.state_slots] == [
        (f"{place}.batch_norm.{name}", (4,))
        for place in ("0", "1.residual.0", "1.residual.2")
        for name in ("running_mean", "running_variance")
    ]
    assert model.state.tolist() == 3 * ([0.0] * 4 + [1.0] * 4)
    assert model.sum_count == 2 * 9, "a synchronized layer's sums went round within forward"
    assert [slot.decayed for slot in model.slots if "batch_norm" in slot.name] == [False] * 6
    named = model.named_parameters()
    assert named["0.batch_norm.weight"].tolist() == [1] * 4
    assert named["0.batch_norm.bias"].tolist() == [0] * 4
    named["0.batch_norm.bias"][...] = 5
    assert parameters[4:8].tolist() == [5] * 4


def test_a_layer_before_it_is_drawn_for_the_rectifier_behind_it():
    layers = [layer_of("dense", units=200, bias=False), norm(), layer_of("relu"), layer_of("dense", units=2, bias=True)]
    model, _, _ = build(layers, (300,))
    assert model.named_parameters()["0.dense.weight"].std() == pytest.approx(np.sqrt(2 / 300), rel=0.015)


@settings(max_examples=10, deadline=None)
@given(samples=st.integers(2, 6), seed=SEEDS)
def test_the_gradient_of_a_model_that_holds_it_inside_equals_the_difference(difference, samples, seed):
    model, parameters, gradient = build(
        [layer_of("linear", units=4), norm(), layer_of("tanh"), INSIDE, layer_of("dense", units=3, bias=True)], (5, 2)
    )
    random = np.random.default_rng(seed)
    parameters += 0.3 * random.standard_normal(len(parameters))
    x, labels = random.standard_normal((samples, 5, 2)), random.integers(0, 3, samples)
    direction = random.standard_normal(len(parameters))
    model.forward(x, labels, MOMENT)
    model.backward()
    numeric = difference(lambda: model.forward(x, labels, MOMENT).loss, parameters, direction)
    assert gradient @ direction == pytest.approx(numeric, rel=1e-5, abs=1e-7)


CONVOLUTION = job_pb2.Conv2dLayer(filters=4, kernel=[3, 3], padding="same", bias=False)
NETWORKS = {
    "image": ((6, 6, 2), [
        job_pb2.Layer(conv2d=CONVOLUTION),
        job_pb2.Layer(max_pool2d=job_pb2.MaxPool2dLayer(size=[2, 2], padding="valid")),
        job_pb2.Layer(average_pool2d=job_pb2.AveragePool2dLayer(size=[2, 2], stride=[1, 1], padding="same")),
    ]),
    "whole image": ((3, 2, 2), [layer_of("relu"), layer_of("flatten")]),
    "mean of an image": ((3, 2, 2), [layer_of("tanh"), layer_of("global_average_pool")]),
    "sequence": ((5,), [
        layer_of("embedding", vocabulary=7, units=4), layer_of("positions"),
        layer_of("attention", heads=2, causal=True),
        residual(norm(True), layer_of("linear", units=4), layer_of("dropout", rate=0.3)),
        layer_of("layer_norm", epsilon=1e-5),
    ]),
    "activations": ((4,), [
        layer_of("softmax"), *(layer_of(kind) for kind in ("sigmoid", "gelu", "silu", "softplus")),
        layer_of("leaky_relu", alpha=0.1), layer_of("elu", alpha=1.0),
    ]),
}  # fmt: skip


def kinds(layers):
    """What the layers are, and those inside them."""
    return {kind for layer in layers for kind in (layer.WhichOneof("kind"), *kinds(layer.residual.layers))}


# A layer that nobody has written in above is met by itself.
for kind in sorted(set(LAYERS) - {"dense"} - {kind for _, layers in NETWORKS.values() for kind in kinds(layers)}):
    word, shape = example(kind)
    NETWORKS[kind] = shape, [from_text(word)]


def network_and_batch(name):
    """The layers with normalizations between them, and 6 samples."""
    shape, layers = NETWORKS[name]
    dense = layer_of("dense", units=4, bias=True)
    network = [layers[0], norm(True), *layers[1:], dense, norm(True), layer_of("dense", units=3, bias=True)]
    random = np.random.default_rng(1)
    takes_tokens = traits_of(LAYERS[layers[0].WhichOneof("kind")]).takes is Takes.TOKENS
    x = random.integers(0, NUMBER, (6, *shape)).astype(np.float64) if takes_tokens else random.random((6, *shape))
    return network, shape, x, random.integers(0, 3, 6)


@pytest.mark.parametrize("name", NETWORKS)
def test_beside_any_layer_the_gradient_equals_the_difference(difference, name):
    network, shape, x, labels = network_and_batch(name)
    model, parameters, gradient = build(network, shape)
    random = np.random.default_rng(2)
    parameters += 0.3 * random.standard_normal(len(parameters))
    direction = random.standard_normal(len(parameters))
    model.forward(x, labels, MOMENT)
    model.backward()
    numeric = difference(lambda: model.forward(x, labels, MOMENT).loss, parameters, direction)
    assert gradient @ direction == pytest.approx(numeric, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", NETWORKS)
def test_ranks_without_samples_take_part_whatever_the_layers_are(name):
    """Three ranks of which one or two have nothing, against one with everything: same gradient, same state."""
    network, shape, x, labels = network_and_batch(name)

    def step(low, high, reduce):
        model, _, gradient = build(network, shape, reduce=reduce)
        loss = model.forward(x[low:high], labels[low:high], MOMENT._replace(first=low)).loss
        model.backward()
        model.update_state()
        return loss, gradient, model.state

    loss, gradient, state = step(0, 6, lambda sums: None)
    for edges in ([0, 0, 4, 6], [0, 6, 6, 6]):
        ranks = Ranks(3)
        parts = ranks.run(lambda rank, ranks=ranks, edges=edges: step(*edges[rank : rank + 2], ranks.reduce_of(rank)))
        assert sum(part[0] for part in parts) == pytest.approx(loss, rel=1e-10)
        np.testing.assert_allclose(sum(part[1] for part in parts), gradient, rtol=1e-8, atol=1e-10)
        for part in parts:
            np.testing.assert_allclose(part[2], state, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("layers", "at_once", "batch", "message"),
    [
        ([norm()], 1, 8, "model[1].batch_norm: a worker computes 1 sample at a time, and one value a channel has no"),
        ([norm()], 1, 8, "needs at least 2, by a larger training.batch_size, fewer workers or synchronized: true"),
        ([norm(True)], 1, 1, "model[1].batch_norm: a batch has 1 sample at a time"),
        ([INSIDE], 1, 1, "model[1].residual.layers[0].batch_norm: a worker computes 1 sample"),
        ([norm(True)], 1, 2, None),
        ([norm()], 2, 2, None),
    ],
)
def test_a_lone_value_in_every_step_is_refused_by_place(layers, at_once, batch, message):
    model, _, _ = build([layer_of("dense", units=4, bias=True), *layers], (3,))
    if message is None:
        model.check_batch(at_once, batch)
        return
    with pytest.raises(ModelFault, match=re.escape(message)):
        model.check_batch(at_once, batch)


def test_a_step_allocates_little_once_buffers_are_reserved():
    layers = [norm(), layer_of("relu"), norm(True), layer_of("flatten"), layer_of("dense", units=3, bias=True)]
    model, _, _ = build(layers, (16, 16, 8), np.float32)
    random = np.random.default_rng(1)
    x, labels = random.standard_normal((64, 16, 16, 8)).astype(np.float32), random.integers(0, 3, 64)
    model.reserve(64)
    for _ in itertools.repeat(None, 2):
        tracemalloc.start()
        model.forward(x, labels, MOMENT)
        model.backward()
        model.update_state()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 64_000  # one activation alone is 524 KB
