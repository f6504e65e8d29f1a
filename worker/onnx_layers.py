"""The layers as ONNX nodes.

Rules: `NODES` is the table from a layer's kind to the function that writes its nodes, as the layer acts in evaluation;
a kind that has no ONNX form stands in `WITHOUT_FORM` with the reason instead. A layer in neither trains and predicts,
and export says that nobody has written its form yet.
Images stay (height, width, channels) at the edges of every layer, as in the engine; ONNX wants channels first, so
convolution and pooling turn them there and back. The batch axis is copied from what comes in (0 in a Reshape) and never
written down, so any number of samples will do, none included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np

from worker.engine.chain import Placed
from worker.onnx_graph import Graph

OPSET: Final = 17  # the first with LayerNormalization; Gelu, of 20, is written by its formula for the sake of reach
IR_VERSION: Final = 8  # goes with opset 17: ONNX 1.12 and ONNX Runtime 1.13 of 2022 read it, and all since

WITHOUT_FORM: Final[dict[str, str]] = {}


def add_layers(graph: Graph, layers: Sequence[Placed], prefix: str = "") -> None:
    """The nodes of layers in a row; `prefix` is the place of the layer they stand in, with a dot."""
    for placed in layers:
        graph.place = prefix + placed.place
        NODES[placed.kind](graph, placed)


def faults(layers: Sequence[Placed], place: str = "model") -> Iterator[str]:
    """What keeps layers from being written: a sentence for each, which names it as the job file does."""
    for index, placed in enumerate(layers):
        here = f"{place}[{index}].{placed.kind}"
        if placed.kind in WITHOUT_FORM or placed.kind not in NODES:
            reason = WITHOUT_FORM.get(placed.kind, "nobody has written one into worker/onnx_layers.py")
            yield f"{here}: has no ONNX form: {reason}"
        elif placed.kind == "residual":
            yield from faults(_layer(placed).inside.layers, f"{here}.layers")


def _dense(graph: Graph, placed: Placed) -> None:
    _flatten_to(graph, _layer(placed).inputs)
    _product(graph, placed)


def _product(graph: Graph, placed: Placed) -> None:
    """z = W a + b over the last axis; without a bias b is 0."""
    weight, *bias = _parameters(graph, placed)
    graph.add("MatMul", weight)
    for values in bias:
        graph.add("Add", values)


def _flatten_to(graph: Graph, width: int) -> None:
    graph.add("Reshape", _integers(0, width))


def _conv2d(graph: Graph, placed: Placed) -> None:
    weight, *bias = _values(placed)
    operands = [graph.parameter("weight", weight.transpose(3, 2, 0, 1))]
    operands += [graph.parameter("bias", values) for values in bias]
    _channels_first(graph, placed, "Conv", *operands)


def _channels_first(graph: Graph, placed: Placed, operator: str, *operands: str, **attributes: Any) -> None:
    down, across, _ = _layer(placed).windows
    graph.add("Transpose", perm=[0, 3, 1, 2])
    graph.add(
        operator,
        *operands,
        kernel_shape=[down.window, across.window],
        strides=[down.stride, across.stride],
        pads=[down.before, across.before, down.after, across.after],
        **attributes,
    )
    graph.add("Transpose", perm=[0, 2, 3, 1])


def _gelu(graph: Graph, placed: Placed) -> None:
    """x (1 + erf(x / sqrt 2)) / 2."""
    given = graph.current
    graph.add("Div", _number(math.sqrt(2)))
    graph.add("Erf")
    graph.add("Add", _number(1))
    graph.add("Mul", given)
    graph.add("Mul", _number(0.5))


def _silu(graph: Graph, placed: Placed) -> None:
    given = graph.current
    graph.add("Sigmoid")
    graph.add("Mul", given)


def _layer_norm(graph: Graph, placed: Placed) -> None:
    graph.add("LayerNormalization", *_parameters(graph, placed), axis=-1, epsilon=float(_layer(placed).epsilon))


def _batch_norm(graph: Graph, placed: Placed) -> None:
    """(x - m) w / sqrt(v + epsilon) + b with the running mean m and variance v."""
    layer = _layer(placed)
    mean, variance = layer.running_mean, layer.running_variance
    graph.add("Sub", graph.parameter("running_mean", mean))
    factor = layer.weight / np.sqrt(variance.astype(np.float64) + layer.epsilon)
    graph.add("Mul", graph.parameter("factor", factor.astype(np.float32)))
    graph.add("Add", graph.parameter("bias", layer.bias))


def _residual(graph: Graph, placed: Placed) -> None:
    given = graph.current
    place = graph.place
    add_layers(graph, _layer(placed).inside.layers, f"{place}.")
    graph.place = place
    graph.add("Add", given)


def _embedding(graph: Graph, placed: Placed) -> None:
    tokens = graph.current
    (graph.current,) = _parameters(graph, placed)
    graph.add("Gather", tokens, axis=0)


def _attention(graph: Graph, placed: Placed) -> None:
    """softmax(Q K^T / sqrt(d)) V for each head; Q, K and V have a product each, which every runtime knows to read."""
    layer = _layer(placed)
    in_weight, in_bias, out_weight, out_bias = _values(placed)
    given = graph.current
    by_head = _integers(0, layer.time, layer.heads, layer.width)

    def project(part: int, name: str, axes: list[int]) -> str:
        graph.current = given
        columns = slice(part * layer.features, (part + 1) * layer.features)
        graph.add("MatMul", graph.parameter(f"in_weight.{name}", in_weight[:, columns]))
        graph.add("Add", graph.parameter(f"in_bias.{name}", in_bias[columns]))
        graph.add("Reshape", by_head)
        return graph.add("Transpose", perm=axes)

    query = project(0, "query", [0, 2, 1, 3])  # (n, heads, time, d)
    key = project(1, "key", [0, 2, 3, 1])  # (n, heads, d, time)
    value = project(2, "value", [0, 2, 1, 3])
    graph.current = query
    graph.add("Mul", _number(layer.scale))
    graph.add("MatMul", key)
    if layer.causal:
        graph.add("Add", np.triu(np.full((layer.time, layer.time), -np.inf, np.float32), 1))
    graph.add("Softmax", axis=-1)
    graph.add("MatMul", value)
    graph.add("Transpose", perm=[0, 2, 1, 3])
    graph.add("Reshape", _integers(0, layer.time, layer.features))
    graph.add("MatMul", graph.parameter("out_weight", out_weight))
    graph.add("Add", graph.parameter("out_bias", out_bias))


NODES: Final[dict[str, Callable[[Graph, Placed], object]]] = {
    "dense": _dense,
    "sigmoid": lambda graph, placed: graph.add("Sigmoid"),
    "tanh": lambda graph, placed: graph.add("Tanh"),
    "relu": lambda graph, placed: graph.add("Relu"),
    "leaky_relu": lambda graph, placed: graph.add("LeakyRelu", alpha=float(_layer(placed).alpha)),
    "softmax": lambda graph, placed: graph.add("Softmax", axis=-1),
    "conv2d": _conv2d,
    "max_pool2d": lambda graph, placed: _channels_first(graph, placed, "MaxPool"),
    "average_pool2d": lambda graph, placed: _channels_first(graph, placed, "AveragePool", count_include_pad=0),
    "global_average_pool": lambda graph, placed: graph.add("ReduceMean", axes=[1, 2], keepdims=0),
    "flatten": lambda graph, placed: _flatten_to(graph, math.prod(placed.layer.output_shape)),
    "gelu": _gelu,
    "silu": _silu,
    "elu": lambda graph, placed: graph.add("Elu", alpha=float(_layer(placed).alpha)),
    "softplus": lambda graph, placed: graph.add("Softplus"),
    "layer_norm": _layer_norm,
    "batch_norm": _batch_norm,
    "residual": _residual,
    "dropout": lambda graph, placed: None,
    "embedding": _embedding,
    "positions": lambda graph, placed: graph.add("Add", *_parameters(graph, placed)),
    "linear": _product,
    "attention": _attention,
}


def _layer(placed: Placed) -> Any:
    """The layer with what its own kind has beside the protocol."""
    return placed.layer


def _values(placed: Placed) -> list[np.ndarray]:
    """The layer's parameters in the order it names them."""
    held = [getattr(placed.layer, parameter.name) for parameter in placed.layer.parameters]
    return [values[0] if isinstance(values, list) else values for values in held]


def _parameters(graph: Graph, placed: Placed) -> list[str]:
    """The same, as operands under their names."""
    pairs = zip(placed.layer.parameters, _values(placed), strict=True)
    return [graph.parameter(parameter.name, values) for parameter, values in pairs]


def _integers(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def _number(value: float) -> np.ndarray:
    return np.array(value, np.float32)
