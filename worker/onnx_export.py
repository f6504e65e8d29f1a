"""A trained model as an ONNX graph for whatever reads those: preprocessing, layers, and the loss's last activation.

Rules: `NODES` is the table from a layer's kind to its nodes; a layer that is not in it is refused by name before
anything is written. Images stay (height, width, channels) at the edges of every layer, as in the engine; ONNX wants
channels first, so convolution and pooling turn them there and back. onnx is an extra and loaded only here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from worker.checkpoint import replacing
from worker.data.preprocessing import Preprocessing
from worker.engine.chain import Placed
from worker.errors import ModelFault, UsageFault
from worker.model_file import TrainedModel, read_model

OPSET: Final = 20  # the first with Gelu
IR_VERSION: Final = 10  # of ONNX 1.16, so that runtimes older than the onnx package read it
PREDICTIONS: Final = {"softmax_cross_entropy": "Softmax", "binary_cross_entropy": "Sigmoid"}


class Graph:
    """Nodes one behind the other; `current` names the newest output."""

    def __init__(self, onnx: Any, first: str) -> None:
        self.onnx = onnx
        self.current = first
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def add(self, operator: str, *operands: np.ndarray | str, **attributes: Any) -> None:
        """A node that takes the newest output, then `operands`: arrays become constants, texts name outputs."""
        names = [operand if isinstance(operand, str) else self._constant(operand) for operand in operands]
        output = f"{operator.lower()}_{len(self.nodes)}"
        node = self.onnx.helper.make_node(operator, [self.current, *names], [output], name=output, **attributes)
        self.nodes.append(node)
        self.current = output

    def _constant(self, values: np.ndarray) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(self.onnx.numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name


def _dense(graph: Graph, placed: Placed) -> None:
    layer: Any = placed.layer
    _flatten_to(graph, layer.inputs)
    weight, *bias = _values(placed)
    graph.add("MatMul", weight)
    for values in bias:
        graph.add("Add", values)


def _flatten_to(graph: Graph, width: int) -> None:
    graph.add("Reshape", np.array([-1, width], np.int64))


def _channels_first(graph: Graph, placed: Placed, operator: str, *operands: np.ndarray, **attributes: Any) -> None:
    layer: Any = placed.layer
    down, across, _ = layer.windows
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


def _conv2d(graph: Graph, placed: Placed) -> None:
    weight, *bias = _values(placed)
    _channels_first(graph, placed, "Conv", weight.transpose(3, 2, 0, 1), *bias)


def _silu(graph: Graph, placed: Placed) -> None:
    given = graph.current
    graph.add("Sigmoid")
    graph.add("Mul", given)


NODES: Final[dict[str, Callable[[Graph, Placed], None]]] = {
    "dense": _dense,
    "sigmoid": lambda graph, placed: graph.add("Sigmoid"),
    "tanh": lambda graph, placed: graph.add("Tanh"),
    "relu": lambda graph, placed: graph.add("Relu"),
    "leaky_relu": lambda graph, placed: graph.add("LeakyRelu", alpha=_alpha(placed)),
    "softmax": lambda graph, placed: graph.add("Softmax", axis=-1),
    "conv2d": _conv2d,
    "max_pool2d": lambda graph, placed: _channels_first(graph, placed, "MaxPool"),
    "average_pool2d": lambda graph, placed: _channels_first(graph, placed, "AveragePool", count_include_pad=0),
    "global_average_pool": lambda graph, placed: graph.add("ReduceMean", np.array([1, 2], np.int64), keepdims=0),
    "flatten": lambda graph, placed: _flatten_to(graph, math.prod(placed.layer.output_shape)),
    "gelu": lambda graph, placed: graph.add("Gelu"),
    "silu": _silu,
    "elu": lambda graph, placed: graph.add("Elu", alpha=_alpha(placed)),
    "softplus": lambda graph, placed: graph.add("Softplus"),
}


def export_folder(folder: Path, path: Path) -> None:
    """Write the model of a finished run to `path`.

    Raises:
        Fault: onnx is not installed, the model is not usable, or a layer has no ONNX form.
    """
    try:
        import onnx
    except ImportError as error:
        raise UsageFault("export needs the onnx package: pip install 'paceline[onnx]'") from error
    content = to_onnx(onnx, read_model(folder)).SerializeToString()
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def to_onnx(onnx: Any, trained: TrainedModel) -> Any:
    """The ModelProto: `features` (n, *sample_shape) float32, as a data file holds them -> `outputs`."""
    model = trained.model
    missing = [f"model[{index}].{placed.kind}" for index, placed in enumerate(model.layers) if placed.kind not in NODES]
    if missing:
        raise ModelFault(f"{', '.join(missing)}: has no ONNX form; layers that have one: {', '.join(NODES)}")
    graph = Graph(onnx, "features")
    _preprocess(graph, trained.preprocessing, model.sample_shape)
    for placed in model.layers:
        NODES[placed.kind](graph, placed)
    if model.loss_kind in PREDICTIONS:
        attributes = {"axis": -1} if PREDICTIONS[model.loss_kind] == "Softmax" else {}
        graph.add(PREDICTIONS[model.loss_kind], **attributes)
    graph.nodes[-1].output[0] = "outputs"
    kind = onnx.TensorProto.FLOAT
    made = onnx.helper.make_graph(
        graph.nodes,
        "model",
        [onnx.helper.make_tensor_value_info("features", kind, ["n", *model.sample_shape])],
        [onnx.helper.make_tensor_value_info("outputs", kind, ["n", *model.output_shape])],
        graph.constants,
    )
    opset = [onnx.helper.make_opsetid("", OPSET)]
    result = onnx.helper.make_model(made, opset_imports=opset, ir_version=IR_VERSION, producer_name="paceline")
    onnx.checker.check_model(result, full_check=True)
    return result


def _preprocess(graph: Graph, preprocessing: Preprocessing, sample_shape: Sequence[int]) -> None:
    if preprocessing.mean is not None:
        graph.add("Sub", np.array(preprocessing.mean, np.float32).reshape(sample_shape))
        graph.add("Mul", (1 / np.array(preprocessing.deviation)).astype(np.float32).reshape(sample_shape))
    elif preprocessing.scale != 1:
        graph.add("Mul", np.array(preprocessing.scale, np.float32))


def _values(placed: Placed) -> list[np.ndarray]:
    """The layer's parameters in the order it names them."""
    layer: Any = placed.layer
    held = [getattr(layer, parameter.name) for parameter in placed.layer.parameters]
    return [values[0] if isinstance(values, list) else values for values in held]


def _alpha(placed: Placed) -> float:
    layer: Any = placed.layer
    return float(layer.alpha)
