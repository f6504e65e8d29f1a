"""The engine and its optimizers against scikit-learn's multi-layer perceptron: the same start, the same steps."""

import numpy as np
import pytest
from sklearn.neural_network import MLPClassifier, MLPRegressor

from protos import job_pb2
from worker.optimizers import make_optimizer

STEPS = 6
ACTIVATION = {"sigmoid": "logistic", "tanh": "tanh", "relu": "relu"}
OPTIMIZERS = {
    "sgd": (
        job_pb2.Optimizer(sgd=job_pb2.SgdOptimizer(learning_rate=0.1)),
        {"solver": "sgd", "momentum": 0.0, "learning_rate_init": 0.1},
    ),
    # scikit-learn scales the gradient into the velocity: the same steps while the rate is constant. Its Nesterov step
    # is -eta (g + mu v) too.
    "momentum": (
        job_pb2.Optimizer(momentum=job_pb2.MomentumOptimizer(learning_rate=0.1, momentum=0.9, nesterov=False)),
        {"solver": "sgd", "momentum": 0.9, "nesterovs_momentum": False, "learning_rate_init": 0.1},
    ),
    "nesterov": (
        job_pb2.Optimizer(momentum=job_pb2.MomentumOptimizer(learning_rate=0.1, momentum=0.9, nesterov=True)),
        {"solver": "sgd", "momentum": 0.9, "nesterovs_momentum": True, "learning_rate_init": 0.1},
    ),
    # It adds epsilon before the bias correction instead of behind: with a tiny one both are the same.
    "adam": (
        job_pb2.Optimizer(adam=job_pb2.AdamOptimizer(learning_rate=0.01, beta1=0.9, beta2=0.999, epsilon=1e-14)),
        {"solver": "adam", "epsilon": 1e-14, "learning_rate_init": 0.01},
    ),
}


def flat(peer):
    """scikit-learn's weights (in, out) and biases in the order of our vector."""
    return np.concatenate([part.ravel() for pair in zip(peer.coefs_, peer.intercepts_, strict=True) for part in pair])


def compare(engine, make, made, features, ours, theirs, optimizer, settings):
    """Full-batch steps in both from scikit-learn's own initial weights; returns the peer."""
    spec, options = OPTIMIZERS[optimizer]
    common = {"hidden_layer_sizes": (7, 5), "alpha": 0.0, "batch_size": len(features), "random_state": 3, **options}
    still = make(**{**common, **settings, "learning_rate_init": 1e-300}).partial_fit(features, **theirs)
    made.parameters[:] = flat(still)  # a step of that size moves nothing: these are the initial weights
    peer = make(**{**common, **settings})
    step_of = make_optimizer(spec)
    state = step_of.init(len(made.parameters), np.float64)
    rate = options["learning_rate_init"]
    for step in range(1, STEPS + 1):
        peer.partial_fit(features, **theirs)
        loss = made.model.forward(features, ours).loss / len(features)
        made.model.backward()
        made.gradient /= len(features)
        step_of.update(made.parameters, made.gradient, state, step, rate, ())
        np.testing.assert_allclose(made.parameters, flat(peer), rtol=1e-7, atol=1e-9)
    return peer, loss


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("activation", ACTIVATION)
def test_softmax_cross_entropy_steps_equal_the_classifier_s(engine, activation, optimizer):
    made = engine.build(["dense:7", activation, "dense:5", activation, "dense:3"], "softmax_cross_entropy", (4,))
    features, labels = engine.draw_batch(made.model, 20, 1)
    settings = {"activation": ACTIVATION[activation]}
    peer, loss = compare(
        engine, MLPClassifier, made, features, labels, {"y": labels, "classes": np.arange(3)}, optimizer, settings
    )
    assert loss == pytest.approx(peer.loss_, rel=1e-6)
    np.testing.assert_allclose(made.model.outputs(features), peer.predict_proba(features), rtol=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_binary_cross_entropy_steps_equal_the_classifier_s(engine, optimizer):
    made = engine.build(["dense:7", "tanh", "dense:5", "tanh", "dense:1"], "binary_cross_entropy", (4,))
    features, _ = engine.draw_batch(made.model, 20, 2)
    labels = np.arange(20) % 2
    targets = labels[:, None].astype(float)
    peer, loss = compare(
        engine,
        MLPClassifier,
        made,
        features,
        targets,
        {"y": labels, "classes": np.arange(2)},
        optimizer,
        {"activation": "tanh"},
    )
    assert loss == pytest.approx(peer.loss_, rel=1e-6)
    np.testing.assert_allclose(made.model.outputs(features)[:, 0], peer.predict_proba(features)[:, 1], rtol=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_mean_squared_error_steps_equal_the_regressor_s(engine, optimizer):
    made = engine.build(["dense:7", "relu", "dense:5", "relu", "dense:1"], "mean_squared_error", (4,))
    features, targets = engine.draw_batch(made.model, 20, 3)
    peer, loss = compare(
        engine, MLPRegressor, made, features, targets, {"y": targets[:, 0]}, optimizer, {"activation": "relu"}
    )
    assert loss == pytest.approx(peer.loss_, rel=1e-6)
