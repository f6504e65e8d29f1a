"""The layers of a job file in JAX.

Rules: images are (height, width, channels), the order XLA's convolutions are fast in. Pooling is a maximum over a
reshaped array: reduce_window's gradient took the whole step three times as long here.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from stopwatch import kind_and_options

Shape = tuple[int, ...]  # of a sample
Weights = Any  # a tree of arrays
Apply = Callable[[Weights, jax.Array], jax.Array]


def _affine(random: np.random.Generator, inputs: int, outputs: int, shape: Shape | None = None) -> list[np.ndarray]:
    """A weight, normal with variance 1/inputs, and a bias."""
    weight = random.standard_normal(shape or (inputs, outputs), np.float32) / np.float32(math.sqrt(inputs))
    return [weight, np.zeros(outputs, np.float32)]


def _dense(random: Any, options: Any, shape: Shape) -> tuple[Weights, Apply, Shape]:
    weights = _affine(random, math.prod(shape), options["units"])
    return weights, lambda w, x: x.reshape(len(x), -1) @ w[0] + w[1], (options["units"],)


def _linear(random: Any, options: Any, shape: Shape) -> tuple[Weights, Apply, Shape]:
    weights = _affine(random, shape[-1], options["units"])
    return weights, lambda w, x: x @ w[0] + w[1], (*shape[:-1], options["units"])


def _conv2d(random: Any, options: Any, shape: Shape) -> tuple[Weights, Apply, Shape]:
    height, width, channels = shape
    kernel, filters = options["kernel"], options["filters"]
    weights = _affine(random, kernel * kernel * channels, filters, (kernel, kernel, channels, filters))

    def apply(w: Weights, x: jax.Array) -> jax.Array:
        order = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w[0], (1, 1), "SAME", dimension_numbers=order) + w[1]

    return weights, apply, (height, width, filters)


def _max_pool2d(_: Any, options: Any, shape: Shape) -> tuple[Weights, Apply, Shape]:
    size = options["size"]
    rows, columns, channels = shape[0] // size, shape[1] // size, shape[2]

    def apply(w: Weights, x: jax.Array) -> jax.Array:
        return x.reshape(len(x), rows, size, columns, size, channels).max((2, 4))

    return [], apply, (rows, columns, channels)


def _embedding(random: Any, options: Any, shape: Shape) -> tuple[Weights, Apply, Shape]:
    weight = random.standard_normal((options["vocabulary"], options["units"]), np.float32)
    return weight, lambda w, x: w[x], (*shape, options["units"])


def _positions(random: Any, _: Any, shape: Shape) -> tuple[Weights, Apply, Shape]:
    return np.float32(0.02) * random.standard_normal(shape, np.float32), lambda w, x: x + w, shape


def _attention(random: Any, options: Any, shape: Shape) -> tuple[Weights, Apply, Shape]:
    time, width = shape
    heads, causal = options.get("heads", 1), options.get("causal", False)
    weights = [_affine(random, width, 3 * width), _affine(random, width, width)]

    def apply(w: Weights, x: jax.Array) -> jax.Array:
        projected = (x @ w[0][0] + w[0][1]).reshape(len(x), time, 3, heads, width // heads)
        q, k, v = projected.transpose(2, 0, 3, 1, 4)
        scores = q @ k.swapaxes(2, 3) / math.sqrt(width // heads)
        if causal:
            scores = jnp.where(np.tri(time, dtype=bool), scores, -jnp.inf)
        gathered = (jax.nn.softmax(scores) @ v).swapaxes(1, 2)
        return gathered.reshape(x.shape) @ w[1][0] + w[1][1]

    return weights, apply, shape


def _layer_norm(_: Any, __: Any, shape: Shape) -> tuple[Weights, Apply, Shape]:
    weights = [np.ones(shape[-1], np.float32), np.zeros(shape[-1], np.float32)]

    def apply(w: Weights, x: jax.Array) -> jax.Array:
        return jax.nn.standardize(x, axis=-1, epsilon=1e-5) * w[0] + w[1]

    return weights, apply, shape


def _residual(random: Any, options: Any, shape: Shape) -> tuple[Weights, Apply, Shape]:
    weights, inside = make_layers(random, options["layers"], shape)
    return weights, lambda w, x: x + inside(w, x), shape


# Each makes a layer for samples of a shape: weights to begin with, the function, and what shape comes out.
LAYERS: dict[str, Callable[[Any, Any, Shape], tuple[Weights, Apply, Shape]]] = {
    "dense": _dense,
    "linear": _linear,
    "conv2d": _conv2d,
    "max_pool2d": _max_pool2d,
    "embedding": _embedding,
    "positions": _positions,
    "attention": _attention,
    "layer_norm": _layer_norm,
    "residual": _residual,
    "relu": lambda _random, _options, shape: ([], lambda _, x: jax.nn.relu(x), shape),
    "gelu": lambda _random, _options, shape: ([], lambda _, x: jax.nn.gelu(x, approximate=False), shape),
}


def make_layers(random: np.random.Generator, layers: list[Any], shape: Shape) -> tuple[list[Weights], Apply]:
    """Weights and the function of layers in a row."""
    weights: list[Weights] = []
    functions: list[Apply] = []
    for kind, options in map(kind_and_options, layers):
        own, function, shape = LAYERS[kind](random, options, shape)
        weights.append(own)
        functions.append(function)

    def apply(w: Weights, x: jax.Array) -> jax.Array:
        for function, own in zip(functions, w, strict=True):
            x = function(own, x)
        return x

    return weights, apply


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over samples, or over all positions of all samples."""
    right = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return (jax.nn.logsumexp(logits, axis=-1) - right).mean()
