"""The engine against a plain transcription of the seed document (samples as columns, means over m)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos import job_pb2
from worker.optimizers import make_optimizer

ACTIVATIONS = ["sigmoid", "tanh", "relu", "leaky_relu"]


def words_for(sizes, kinds):
    """The job's layers for units and the document's activation behind each."""
    return [
        word
        for units, kind in zip(sizes, kinds, strict=True)
        for word in ([f"dense:{units}"] if kind == "identity" else [f"dense:{units}", kind])
    ]


@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(1, 9),
    inputs=st.integers(1, 6),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    data=st.data(),
    seed=st.integers(0, 2**32 - 1),
)
def test_forward_loss_and_gradients_are_the_documents(engine, document, samples, inputs, sizes, data, seed):
    kinds = [data.draw(st.sampled_from([*ACTIVATIONS, "identity"])) for _ in sizes]
    made = engine.build(words_for(sizes, kinds), "mean_squared_error", (inputs,))
    features, targets = engine.draw_batch(made.model, samples, seed)
    W, b = document.parameters_of(made.model)

    a, z = document.forward(features.T, W, b, kinds)
    dW, db = document.backprop(a, z, targets.T, W, kinds)
    np.testing.assert_allclose(made.model.outputs(features), a[-1].T, rtol=1e-12, atol=1e-12)
    totals = made.model.forward(features, targets)
    made.model.backward()

    assert totals.loss / samples == pytest.approx(document.mean_squared_error(targets.T, a[-1]), rel=1e-12)
    ours = made.gradient / samples
    theirs = np.concatenate([part.ravel() for w, v in zip(dW, db, strict=True) for part in (w.T, v)])
    np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def test_softmax_with_cross_entropy_is_the_documents_delta_without_f_prime(engine, document):
    kinds = ["tanh", "softmax"]
    made = engine.build(["dense:5", "tanh", "dense:4"], "softmax_cross_entropy", (3,))
    features, labels = engine.draw_batch(made.model, 8, 3)
    W, b = document.parameters_of(made.model)
    one_hot = np.eye(4)[labels].T
    a, z = document.forward(features.T, W, b, kinds)
    dW, db = document.backprop(a, z, one_hot, W, kinds, fused=True)

    totals = made.model.forward(features, labels)
    made.model.backward()
    assert totals.loss == pytest.approx(-np.sum(one_hot * np.log(a[-1])), rel=1e-12)
    theirs = np.concatenate([part.ravel() for w, v in zip(dW, db, strict=True) for part in (w.T, v)])
    np.testing.assert_allclose(made.gradient / 8, theirs, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(made.model.outputs(features), a[-1].T, rtol=1e-12)


# "Gradient Descent Variants": all samples per update, one sample, small subsets, the last one uneven (10 = 4 + 4 + 2).
@pytest.mark.parametrize("batch_size", [10, 1, 4], ids=["batch", "stochastic", "mini-batch"])
def test_training_by_the_documents_pseudocode_gives_the_same_weights(engine, document, batch_size):
    kinds, rate = ["sigmoid", "relu", "identity"], 0.05
    made = engine.build(words_for([6, 5, 2], kinds), "mean_squared_error", (3,))
    features, targets = engine.draw_batch(made.model, 10, 5)
    W, b = document.parameters_of(made.model)
    optimizer = make_optimizer(job_pb2.Optimizer(sgd=job_pb2.SgdOptimizer(learning_rate=rate)))

    for _ in range(5):
        for start in range(0, 10, batch_size):
            x, y = features[start : start + batch_size], targets[start : start + batch_size]
            a, z = document.forward(x.T, W, b, kinds)
            dW, db = document.backprop(a, z, y.T, W, kinds)
            for i in range(len(W)):
                W[i] -= rate * dW[i]
                b[i] -= rate * db[i]

            made.model.forward(x, y)
            made.model.backward()
            made.gradient /= len(x)
            optimizer.update(made.parameters, made.gradient, {}, 1, rate, ())

    theirs = np.concatenate([part.ravel() for w, v in zip(W, b, strict=True) for part in (w.T, v)])
    np.testing.assert_allclose(made.parameters, theirs, rtol=1e-11, atol=1e-13)


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(0, 9), loss=st.sampled_from(["mean_squared_error", "softmax_cross_entropy"]))
def test_gradient_sums_of_two_parts_add_up_to_the_whole_however_it_is_cut(engine, cut, loss):
    made = engine.build(["dense:6", "relu", "dense:3"], loss, (4,))
    features, targets = engine.draw_batch(made.model, 9, 11)
    whole = made.model.forward(features, targets)
    made.model.backward()
    expected = made.gradient.copy()

    loss_sum, gradient_sum = 0.0, np.zeros_like(expected)
    for part in (slice(0, cut), slice(cut, 9)):
        loss_sum += made.model.forward(features[part], targets[part]).loss
        made.model.backward()
        gradient_sum += made.gradient
    assert loss_sum == pytest.approx(whole.loss, rel=1e-12)
    np.testing.assert_allclose(gradient_sum, expected, rtol=1e-10, atol=1e-12)


def test_single_neuron_example_worked_by_hand(engine):
    """The document's single neuron y = f(W x + b), with f the sigmoid, W = 0.5, b = -1, x = 2, y_true = 1, eta = 0.1.

    z = 0.5 * 2 - 1 = 0                       y = f(0) = 1/(1 + 1) = 0.5          f'(z) = 0.5 (1 - 0.5) = 0.25
    L = 1/2 (1 - 0.5)^2 = 0.125
    dL/dW = (y - y_true) f'(z) x = (0.5 - 1) * 0.25 * 2 = -0.25
    dL/db = (y - y_true) f'(z)   = (0.5 - 1) * 0.25     = -0.125
    W := 0.5 - 0.1 * (-0.25) = 0.525          b := -1 - 0.1 * (-0.125) = -0.9875
    """
    made = engine.build(["dense:1", "sigmoid"], "mean_squared_error", (1,))
    made.parameters[:] = [0.5, -1.0]
    optimizer = make_optimizer(job_pb2.Optimizer(sgd=job_pb2.SgdOptimizer(learning_rate=0.1)))
    x, y_true = np.array([[2.0]]), np.array([[1.0]])

    assert made.model.outputs(x).tolist() == [[0.5]]
    assert made.model.forward(x, y_true).loss == 0.125
    made.model.backward()
    assert made.gradient.tolist() == [-0.25, -0.125]
    optimizer.update(made.parameters, made.gradient, {}, 1, 0.1, ())
    np.testing.assert_allclose(made.parameters, [0.525, -0.9875], rtol=1e-15)
