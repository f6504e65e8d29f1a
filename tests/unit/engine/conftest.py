"""What the engine's tests share: models from short words, a directional difference, the seed document transcribed.

Everything is handed out by session fixtures, so that property-based tests may use it.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from protos import job_pb2
from protos.rules import resolve
from tests.unit.engine.any_layer import from_text
from worker.engine.losses import LOSSES
from worker.engine.model import Model

LABEL_LOSS = "softmax_cross_entropy"


def layer(word: str) -> job_pb2.Layer:
    """`dense:8`, `relu`, `leaky_relu:0.1`, `conv2d: {filters: 4, kernel: 3}`: a layer of a resolved job."""
    if "{" in word:
        return from_text(word)
    kind, _, setting = word.partition(":")
    message = job_pb2.Layer()
    options = getattr(message, kind)
    options.SetInParent()
    if kind == "dense":
        options.units = int(setting)
        options.bias = True
    if kind in ("leaky_relu", "elu"):
        options.alpha = float(setting or 0.01)
    return message


def loss_message(kind: str, **settings: Any) -> job_pb2.Loss:
    """A loss of a resolved job."""
    job = job_pb2.JobSpec()
    options = getattr(job.loss, kind)
    options.SetInParent()
    for name, value in settings.items():
        if isinstance(value, list):
            getattr(options, name).extend(value)
        else:
            setattr(options, name, value)
    return resolve(job).loss


def make_loss(kind: str, output_shape: tuple[int, ...], **settings: Any) -> Any:
    """A loss alone, without buffers."""
    return LOSSES[kind](getattr(loss_message(kind, **settings), kind), output_shape)


def build(words: Sequence[str], loss: str, sample_shape: tuple[int, ...], dtype: Any = np.float64) -> SimpleNamespace:
    """A model attached to vectors of its own: (model, parameters, gradient). All parameters are random, biases too."""
    model = Model([layer(word) for word in words], loss_message(loss), sample_shape, dtype)
    parameters = np.random.default_rng(7).normal(0, 0.6, model.parameter_count).astype(dtype)
    gradient = np.full(model.parameter_count, np.nan, dtype)  # whatever is not written shows
    model.attach(parameters, gradient)
    return SimpleNamespace(model=model, parameters=parameters, gradient=gradient)


def draw_batch(model: Model, samples: int, seed: int) -> tuple[Any, Any]:
    """Features and targets that fit a model."""
    random = np.random.default_rng(seed)
    features = random.standard_normal((samples, *model.sample_shape)).astype(model.dtype)
    units = model.output_shape[0]
    if model.loss_kind == LABEL_LOSS:
        return features, random.integers(0, units, samples)
    return features, random.random((samples, units)).astype(model.dtype)


def directional_difference(function: Callable[[], float], point: Any, direction: Any, step: float = 1e-6) -> float:
    """Central difference of `function` along `direction`, moving `point` in place and putting it back.

    (f(x + h d) - f(x - h d)) / 2h differs from <grad f, d> by O(h^2): one number checks the whole gradient.
    """
    start = point.copy()
    point[...] = start + step * direction
    ahead = function()
    point[...] = start - step * direction
    behind = function()
    point[...] = start
    return (ahead - behind) / (2 * step)


class Document:
    """The seed document's equations as they stand there: samples are columns, W is (out, in), means over m samples."""

    f: dict[str, Callable[[Any], Any]] = {  # noqa: RUF012
        "identity": lambda x: x,
        "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
        "tanh": np.tanh,
        "relu": lambda x: np.maximum(0, x),
        "leaky_relu": lambda x: np.maximum(0.01 * x, x),
        "softmax": lambda x: np.exp(x) / np.exp(x).sum(axis=0),
    }
    f_prime: dict[str, Callable[[Any], Any]] = {  # noqa: RUF012
        "identity": np.ones_like,
        "sigmoid": lambda x: Document.f["sigmoid"](x) * (1 - Document.f["sigmoid"](x)),
        "tanh": lambda x: 1 - np.tanh(x) ** 2,
        "relu": lambda x: np.where(x > 0, 1.0, 0.0),
        "leaky_relu": lambda x: np.where(x > 0, 1.0, 0.01),
    }

    @staticmethod
    def forward(X: Any, W: list[Any], b: list[Any], kinds: list[str]) -> tuple[list[Any], list[Any]]:
        """z^[l] = W^[l] a^[l-1] + b^[l];  a^[l] = f(z^[l])."""
        a, z = [X], []
        for W_l, b_l, kind in zip(W, b, kinds, strict=True):
            z.append(W_l @ a[-1] + b_l)
            a.append(Document.f[kind](z[-1]))
        return a, z

    @staticmethod
    def mean_squared_error(y: Any, y_hat: Any) -> float:
        """L = 1/(2m) sum (y - yhat)^2."""
        return float(1 / (2 * y.shape[1]) * np.sum((y - y_hat) ** 2))

    @staticmethod
    def backprop(a: list[Any], z: list[Any], Y: Any, W: list[Any], kinds: list[str], fused: bool = False) -> Any:
        """delta^[L] = (yhat - y) (*) f'(z^[L]), the f' left out where it is fused with cross-entropy;
        delta^[l] = (W^[l+1])^T delta^[l+1] (*) f'(z^[l]);  dW = 1/m delta (a^[l-1])^T;  db = 1/m sum delta."""
        m, last = Y.shape[1], len(W) - 1
        delta: list[Any] = [None] * len(W)
        delta[last] = (a[-1] - Y) if fused else (a[-1] - Y) * Document.f_prime[kinds[last]](z[last])
        for i in range(last - 1, -1, -1):
            delta[i] = (W[i + 1].T @ delta[i + 1]) * Document.f_prime[kinds[i]](z[i])
        dW = [1 / m * delta[i] @ a[i].T for i in range(len(W))]
        db = [1 / m * delta[i].sum(axis=1, keepdims=True) for i in range(len(W))]
        return dW, db

    @staticmethod
    def parameters_of(model: Model) -> tuple[list[Any], list[Any]]:
        """Copies of a model's weights and biases in the document's shapes."""
        named = model.named_parameters()
        W = [value.T.copy() for name, value in named.items() if name.endswith("weight")]
        b = [value.reshape(-1, 1).copy() for name, value in named.items() if name.endswith("bias")]
        return W, b


@pytest.fixture(scope="session")
def engine() -> SimpleNamespace:
    """`build`, `draw_batch`, `layer`, `loss_message`, `make_loss`."""
    return SimpleNamespace(
        build=build, draw_batch=draw_batch, layer=layer, loss_message=loss_message, make_loss=make_loss
    )


@pytest.fixture(scope="session")
def difference() -> Callable[..., float]:
    """The directional difference."""
    return directional_difference


@pytest.fixture(scope="session")
def document() -> type[Document]:
    """The seed document's equations."""
    return Document
