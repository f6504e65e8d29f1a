"""Gradients and training against PyTorch, where it is installed."""

import numpy as np
import pytest

from protos import job_pb2
from worker.optimizers import make_optimizer

torch = pytest.importorskip("torch", reason="PyTorch is not installed: make test-oracle installs and runs it")
pytestmark = pytest.mark.oracle

ACTIVATIONS = {
    "sigmoid": torch.nn.Sigmoid(),
    "tanh": torch.nn.Tanh(),
    "relu": torch.nn.ReLU(),
    "leaky_relu:0.2": torch.nn.LeakyReLU(0.2),
    "softmax": torch.nn.Softmax(dim=1),
}
LOSSES = {
    "mean_squared_error": lambda z, y: 0.5 * torch.nn.functional.mse_loss(z, y, reduction="sum"),
    "softmax_cross_entropy": lambda z, y: torch.nn.functional.cross_entropy(z, y, reduction="sum"),
    "binary_cross_entropy": lambda z, y: torch.nn.functional.binary_cross_entropy_with_logits(z, y, reduction="sum"),
    "huber": lambda z, y: torch.nn.functional.huber_loss(z, y, reduction="sum"),
    "mean_absolute_error": lambda z, y: torch.nn.functional.l1_loss(z, y, reduction="sum"),
}


def forward(words, parameters, x):
    """The same layers by PyTorch's own operations on its copies of the parameters, weights (in, out)."""
    parameters = iter(parameters)
    x = x.flatten(1)
    for word in words:
        x = x @ next(parameters) + next(parameters) if word.startswith("dense") else ACTIVATIONS[word](x)
    return x


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_loss_and_gradient_equal_autograd_s(engine, loss, activation):
    words = ["dense:9", activation, "dense:6", activation, "dense:4"]
    made = engine.build(words, loss, (3, 2))
    features, targets = engine.draw_batch(made.model, 11, 1)
    theirs = [torch.tensor(value, requires_grad=True) for value in made.model.named_parameters().values()]
    peer = LOSSES[loss](forward(words, theirs, torch.tensor(features)), torch.tensor(targets))
    peer.backward()

    assert made.model.forward(features, targets).loss == pytest.approx(peer.item(), rel=1e-12)
    made.model.backward()
    expected = np.concatenate([parameter.grad.numpy().ravel() for parameter in theirs])
    np.testing.assert_allclose(made.gradient, expected, rtol=1e-9, atol=1e-12)


def test_fifty_float32_steps_of_adam_stay_with_torch_s(engine):
    words = ["dense:16", "relu", "dense:4"]
    made = engine.build(words, "softmax_cross_entropy", (8,), np.float32)
    features, labels = engine.draw_batch(made.model, 32, 2)
    options = job_pb2.AdamOptimizer(learning_rate=0.01, beta1=0.9, beta2=0.999, epsilon=1e-8)
    optimizer = make_optimizer(job_pb2.Optimizer(adam=options))
    state = optimizer.init(len(made.parameters), np.float32)
    theirs = [torch.tensor(value.copy(), requires_grad=True) for value in made.model.named_parameters().values()]
    peer = torch.optim.Adam(theirs, lr=0.01)
    for step in range(1, 51):
        made.model.forward(features, labels)
        made.model.backward()
        made.gradient /= 32
        optimizer.update(made.parameters, made.gradient, state, step, 0.01, ())
        peer.zero_grad()
        z = forward(words, theirs, torch.tensor(features))
        torch.nn.functional.cross_entropy(z, torch.tensor(labels)).backward()
        peer.step()
    expected = np.concatenate([parameter.detach().numpy().ravel() for parameter in theirs])
    np.testing.assert_allclose(made.parameters, expected, rtol=1e-3, atol=1e-4)
