"""Optimizers against a plain transcription of their formulas, however the vector is cut, and against PyTorch."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos import job_pb2
from worker import optimizers
from worker.engine.model import Model
from worker.errors import UsageFault
from worker.optimizers import base_learning_rate, make_optimizer
from worker.trust_ratio import add_square_sums, scale, tensors_within, trust_ratios

RATE = 0.03
SPECS = {
    "sgd": job_pb2.Optimizer(sgd=job_pb2.SgdOptimizer(learning_rate=RATE)),
    "momentum": job_pb2.Optimizer(
        momentum=job_pb2.MomentumOptimizer(learning_rate=RATE, momentum=0.85, nesterov=False)
    ),
    "nesterov": job_pb2.Optimizer(momentum=job_pb2.MomentumOptimizer(learning_rate=RATE, momentum=0.85, nesterov=True)),
    "adagrad": job_pb2.Optimizer(adagrad=job_pb2.AdagradOptimizer(learning_rate=RATE, epsilon=1e-6)),
    "lion": job_pb2.Optimizer(lion=job_pb2.LionOptimizer(learning_rate=RATE, beta1=0.88, beta2=0.97, weight_decay=0.2)),
    "rmsprop": job_pb2.Optimizer(
        rmsprop=job_pb2.RmspropOptimizer(learning_rate=RATE, alpha=0.95, epsilon=1e-4, momentum=0)
    ),
    "rmsprop with momentum": job_pb2.Optimizer(
        rmsprop=job_pb2.RmspropOptimizer(learning_rate=RATE, alpha=0.95, epsilon=1e-4, momentum=0.85)
    ),
    "adam": job_pb2.Optimizer(adam=job_pb2.AdamOptimizer(learning_rate=RATE, beta1=0.88, beta2=0.97, epsilon=1e-4)),
    "adam without memory": job_pb2.Optimizer(
        adam=job_pb2.AdamOptimizer(learning_rate=RATE, beta1=0, beta2=0, epsilon=1e-8)
    ),
    "adamw": job_pb2.Optimizer(
        adamw=job_pb2.AdamwOptimizer(learning_rate=RATE, beta1=0.88, beta2=0.97, epsilon=1e-4, weight_decay=0.2)
    ),
    "lamb": job_pb2.Optimizer(
        lamb=job_pb2.LambOptimizer(learning_rate=RATE, beta1=0.88, beta2=0.97, epsilon=1e-4, weight_decay=0.2)
    ),
}
ELEMENTWISE = [name for name in SPECS if name != "lamb"]  # lamb adds up squares, so the last bit may tell of a cut
LENGTH = 101
DECAYED = [(0, 40), (55, 70), (70, 90)]


def gradients(dtype, steps=20, length=LENGTH):
    """Gradients of mixed size, some exactly zero."""
    random = np.random.default_rng(5)
    drawn = random.standard_normal((steps, length)) * 10.0 ** random.integers(-4, 2, length)
    drawn[:, ::17] = 0
    return drawn.astype(dtype)


def start(dtype=np.float64, length=LENGTH):
    """The parameters every run begins with."""
    return np.random.default_rng(6).standard_normal(length).astype(dtype)


def run(spec, dtype, cuts=(), length=LENGTH):
    """20 steps of ours, on pieces between `cuts` as if each were a vector of its own."""
    optimizer = make_optimizer(spec)
    parameters = start(dtype, length)
    bounds = [0, *sorted(cuts), length]
    pieces = list(pairwise(bounds))
    states = [optimizer.init(stop - first, dtype) for first, stop in pieces]
    for step, gradient in enumerate(gradients(dtype, length=length).copy(), start=1):
        parts = [
            (parameters[first:stop], gradient[first:stop], state, decayed_within(first, stop))
            for (first, stop), state in zip(pieces, states, strict=True)
        ]
        if optimizer.direct:
            sums = np.zeros((len(DECAYED), 2))
            tensors = [tensors_within(DECAYED, *bounds) for bounds in pieces]
            for (p, g, state, decayed), within in zip(parts, tensors, strict=True):
                optimizer.direct(p, g, state, step, decayed)
                add_square_sums(sums[within], p, g, decayed)
            for (_, g, _, decayed), within in zip(parts, tensors, strict=True):
                scale(g, decayed, trust_ratios(sums)[within])
        for p, g, state, decayed in parts:
            optimizer.update(p, g, state, step, RATE, decayed)
    return parameters


def decayed_within(first, stop):
    return [(max(a, first) - first, min(b, stop) - first) for a, b in DECAYED if a < stop and first < b]


def plain(name):
    """20 steps by the formulas as their papers and PyTorch's documentation write them, averages and all."""
    theta, options = start(), getattr(SPECS[name], SPECS[name].WhichOneof("kind"))
    buffer = m = v = np.zeros(LENGTH)
    weights = np.zeros(LENGTH, bool)
    for first, stop in DECAYED:
        weights[first:stop] = True
    for t, g in enumerate(gradients(np.float64), start=1):
        if name == "sgd":
            theta = theta - RATE * g
        elif name in ("momentum", "nesterov"):
            buffer = options.momentum * buffer + g
            theta = theta - RATE * (g + options.momentum * buffer if options.nesterov else buffer)
        elif name == "adagrad":
            v = v + g**2
            theta = theta - RATE * g / (np.sqrt(v) + options.epsilon)
        elif name == "lion":
            c = options.beta1 * m + (1 - options.beta1) * g
            theta = theta - RATE * (np.sign(c) + np.where(weights, options.weight_decay * theta, 0))
            m = options.beta2 * m + (1 - options.beta2) * g
        elif name.startswith("rmsprop"):
            v = options.alpha * v + (1 - options.alpha) * g**2
            buffer = options.momentum * buffer + g / (np.sqrt(v) + options.epsilon)
            theta = theta - RATE * buffer
        elif name == "lamb":
            m = options.beta1 * m + (1 - options.beta1) * g
            v = options.beta2 * v + (1 - options.beta2) * g**2
            r = m / (1 - options.beta1**t) / (np.sqrt(v / (1 - options.beta2**t)) + options.epsilon)
            r = r + np.where(weights, options.weight_decay * theta, 0)
            ratio = np.ones(LENGTH)
            for first, stop in DECAYED:
                ratio[first:stop] = np.linalg.norm(theta[first:stop]) / np.linalg.norm(r[first:stop])
            theta = theta - RATE * ratio * r
        else:
            if name == "adamw":
                theta = np.where(weights, theta - RATE * options.weight_decay * theta, theta)
            m = options.beta1 * m + (1 - options.beta1) * g
            v = options.beta2 * v + (1 - options.beta2) * g**2
            m_hat, v_hat = m / (1 - options.beta1**t), v / (1 - options.beta2**t)
            theta = theta - RATE * m_hat / (np.sqrt(v_hat) + options.epsilon)
    return theta


@pytest.mark.parametrize("name", SPECS)
def test_twenty_steps_equal_the_plain_formulas(name):
    np.testing.assert_allclose(run(SPECS[name], np.float64), plain(name), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(run(SPECS[name], np.float32), plain(name), rtol=2e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, LENGTH), max_size=6))
def test_trust_ratios_are_those_of_whole_tensors_wherever_the_vector_is_cut(cuts):
    whole = run(SPECS["lamb"], np.float64)
    np.testing.assert_allclose(run(SPECS["lamb"], np.float64, cuts), whole, rtol=1e-12, atol=1e-13)


def test_a_tensor_of_zeros_and_one_without_a_gradient_have_a_trust_ratio_of_one():
    np.testing.assert_array_equal(trust_ratios(np.array([[0.0, 4], [4, 0], [0, 0], [9, 4]])), [1, 1, 1, 1.5])


@pytest.mark.parametrize("name", ELEMENTWISE)
@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, LENGTH), max_size=4))
def test_cutting_the_vector_anywhere_changes_no_bit(name, cuts):
    np.testing.assert_array_equal(run(SPECS[name], np.float32, cuts), run(SPECS[name], np.float32))


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_slices_that_stay_in_cache_change_no_bit(name, monkeypatch):
    whole = run(SPECS[name], np.float32)
    monkeypatch.setattr(optimizers, "CHUNK_ELEMENTS", 16)
    np.testing.assert_array_equal(run(SPECS[name], np.float32), whole)


def test_the_optimizers_that_decay_weights_are_those_with_the_setting():
    assert {name for name in SPECS if has_decay(name)} == {"adamw", "lion", "lamb"}


@pytest.mark.parametrize("name", ["adamw", "lion", "lamb"])
def test_weight_decay_shrinks_weights_and_leaves_biases_alone(name):
    """Without a gradient W becomes (1 - eta lambda) W; lamb's ratio of |W| to |lambda W| takes lambda out of it."""
    optimizer = make_optimizer(SPECS[name])
    parameters, gradient, state = np.ones(4, np.float32), np.zeros(4, np.float32), optimizer.init(4, np.float32)
    if optimizer.direct:
        optimizer.direct(parameters, gradient, state, 1, [(0, 2)])
        sums = np.zeros((1, 2))
        add_square_sums(sums, parameters, gradient, [(0, 2)])
        scale(gradient, [(0, 2)], trust_ratios(sums))
    optimizer.update(parameters, gradient, state, 1, 0.5, [(0, 2)])
    shrunk = 1 - 0.5 * (1 if name == "lamb" else 0.2)
    np.testing.assert_allclose(parameters, [shrunk, shrunk, 1, 1], rtol=1e-6)


def has_decay(name):
    kind = SPECS[name].WhichOneof("kind")
    return "weight_decay" in getattr(SPECS[name], kind).DESCRIPTOR.fields_by_name


def test_matrices_decay_biases_and_normalizations_do_not():
    """As people set PyTorch's AdamW up: what multiplies decays (weights, kernels, and the tables of tokens and places).

    Biases and a normalization's factors do not: pulled to 0 they would change what the network can say, not its size.
    """
    block = job_pb2.Layer()
    block.residual.layers.add().layer_norm.epsilon = 1e-5
    block.residual.layers.add().attention.heads = 2
    block.residual.layers.add().linear.units = 4
    layers = [job_pb2.Layer(embedding=job_pb2.EmbeddingLayer(vocabulary=9, units=4))]
    layers += [job_pb2.Layer(positions=job_pb2.PositionsLayer()), block]
    layers += [job_pb2.Layer(dense=job_pb2.DenseLayer(units=3, bias=True))]
    loss = job_pb2.Loss(softmax_cross_entropy=job_pb2.SoftmaxCrossEntropyLoss(label_smoothing=0))
    text = Model(layers, loss, (5,))
    kernel = job_pb2.Conv2dLayer(filters=2, kernel=[3], stride=[1], padding="valid", bias=True)
    image = Model([job_pb2.Layer(conv2d=kernel), layers[-1]], loss, (8, 8, 1))
    decays = {slot.name: slot.decayed for model in (text, image) for slot in model.slots}
    assert decays == {
        "0.embedding.weight": True,
        "1.positions.weight": True,
        "2.residual.0.layer_norm.weight": False,
        "2.residual.0.layer_norm.bias": False,
        "2.residual.1.attention.in_weight": True,
        "2.residual.1.attention.in_bias": False,
        "2.residual.1.attention.out_weight": True,
        "2.residual.1.attention.out_bias": False,
        "2.residual.2.linear.weight": True,
        "2.residual.2.linear.bias": False,
        "3.dense.weight": True,
        "3.dense.bias": False,
        "0.conv2d.weight": True,
        "0.conv2d.bias": False,
        "1.dense.weight": True,
        "1.dense.bias": False,
    }


def test_states_are_named_zeros_of_the_length_asked_for():
    names = {
        "sgd": set(),
        "momentum": {"velocity"},
        "adagrad": {"square_sum"},
        "lion": {"first_moment"},
        "rmsprop": {"square_sum"},
        "rmsprop with momentum": {"square_sum", "velocity"},
        "adam": {"first_moment", "second_moment"},
        "lamb": {"first_moment", "second_moment"},
    }
    for name, expected in names.items():
        state = make_optimizer(SPECS[name]).init(7, np.float32)
        assert set(state) == expected
        assert all(array.shape == (7,) and array.dtype == np.float32 and not array.any() for array in state.values())


def test_the_learning_rate_in_use_is_the_caller_s():
    """A schedule decides at each step; float64 numbers of NumPy do not widen the arithmetic."""
    for spec in SPECS.values():
        optimizer = make_optimizer(spec)
        parameters, state = np.ones(5, np.float32), optimizer.init(5, np.float32)
        optimizer.update(parameters, np.ones(5, np.float32), state, 1, np.float64(0.0), [(0, 5)])
        assert (parameters == 1).all()
        assert base_learning_rate(spec) == RATE


def test_an_empty_slice_takes_a_step_too():
    """A rank may own no element of a small model."""
    for spec in SPECS.values():
        optimizer = make_optimizer(spec)
        empty = np.empty(0, np.float32)
        optimizer.update(empty, empty.copy(), optimizer.init(0, np.float32), 1, RATE, [])


def test_an_unresolved_optimizer_is_refused():
    with pytest.raises(
        UsageFault, match="optimizer: names none of sgd, momentum, adagrad, lion, rmsprop, adam, adamw, lamb"
    ):
        make_optimizer(job_pb2.Optimizer())
    with pytest.raises(UsageFault, match=r"optimizer\.adam\.beta1: is absent"):
        make_optimizer(job_pb2.Optimizer(adam=job_pb2.AdamOptimizer(learning_rate=0.1)))


def test_every_optimizer_of_the_job_file_is_tested_here():
    kinds = {spec.WhichOneof("kind") for spec in SPECS.values()}
    assert kinds == set(optimizers.OPTIMIZERS) == {field.name for field in job_pb2.Optimizer.DESCRIPTOR.fields}


def torch_optimizer(torch, name, weights, biases):
    """PyTorch's optimizer of the same settings; weights decay, biases do not."""
    kind = SPECS[name].WhichOneof("kind")
    options = getattr(SPECS[name], kind)
    if kind == "sgd":
        return torch.optim.SGD([*weights, *biases], lr=RATE)
    if kind == "momentum":
        momentum, nesterov = options.momentum, options.nesterov
        return torch.optim.SGD([*weights, *biases], lr=RATE, momentum=momentum, nesterov=nesterov)
    if kind == "adagrad":
        return torch.optim.Adagrad([*weights, *biases], lr=RATE, eps=options.epsilon)
    if kind == "rmsprop":
        return torch.optim.RMSprop(
            [*weights, *biases], lr=RATE, alpha=options.alpha, eps=options.epsilon, momentum=options.momentum
        )
    adam = {"lr": RATE, "betas": (options.beta1, options.beta2), "eps": options.epsilon}
    if kind == "adam":
        return torch.optim.Adam([*weights, *biases], **adam)
    decayed = {"params": weights, "weight_decay": options.weight_decay}
    return torch.optim.AdamW([decayed, {"params": biases, "weight_decay": 0.0}], **adam)


@pytest.mark.oracle
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 2e-5)])
@pytest.mark.parametrize("name", [name for name in SPECS if name not in ("lion", "lamb")])  # PyTorch has neither
def test_twenty_steps_equal_torch_s(name, dtype, tolerance):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make test-oracle installs and runs it")
    edges = sorted({0, LENGTH, *(edge for pair in DECAYED for edge in pair)})
    pieces = {(a, b): torch.nn.Parameter(torch.tensor(start(dtype)[a:b])) for a, b in pairwise(edges)}
    weights = [piece for bounds, piece in pieces.items() if bounds in DECAYED]
    biases = [piece for bounds, piece in pieces.items() if bounds not in DECAYED]
    peer = torch_optimizer(torch, name, weights, biases)
    for gradient in gradients(dtype):
        for (a, b), piece in pieces.items():
            piece.grad = torch.tensor(gradient[a:b])
        peer.step()
    theirs = np.concatenate([piece.detach().numpy() for piece in pieces.values()])
    np.testing.assert_allclose(run(SPECS[name], dtype), theirs, rtol=tolerance, atol=tolerance)
