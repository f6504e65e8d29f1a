"""A trained model as an ONNX graph for whatever reads those: preprocessing, layers, and the loss's last activation.

Rules: the graph takes `features` as a data file holds them, any number of samples, and gives `outputs`, what `predict`
says; it is checked whole before a file is written. Tokens are int64, everything else float32. onnx is an extra and
loaded only here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from worker import model_file
from worker.checkpoint import replacing
from worker.data.preprocessing import Preprocessing
from worker.errors import ModelFault, UsageFault
from worker.model_file import TrainedModel, read_model
from worker.onnx_graph import Graph
from worker.onnx_layers import IR_VERSION, OPSET, add_layers, faults
from worker.output_folder import check_outside_run

PREDICTIONS: Final = {"softmax_cross_entropy": "Softmax", "binary_cross_entropy": "Sigmoid"}
MAX_BYTES: Final = 2_000_000_000  # of constants: protobuf holds 2 GiB in a message, and nodes need some of it
REMEDY: Final = "name another file with --onnx"


def export_folder(folder: Path, path: Path) -> None:
    """Write the model of a finished run to `path`; a file that is there is replaced, unless it belongs to the run.

    Raises:
        Fault: onnx is not installed, the model is not usable, has no ONNX form, or `path` cannot be written.
    """
    try:
        import onnx
    except ImportError as error:
        raise UsageFault("export needs the onnx package: pip install 'paceline[onnx]'") from error
    check_outside_run(folder, path, REMEDY)
    content = to_onnx(onnx, read_model(folder)).SerializeToString()
    with replacing(path, REMEDY) as temporary:
        temporary.write_bytes(content)


def to_onnx(onnx: Any, trained: TrainedModel) -> Any:
    """The ModelProto: `features` (n, *sample_shape) -> `outputs` (n, *output_shape) float32.

    Raises:
        ModelFault: a layer has no ONNX form, or the model is larger than an ONNX file may be.
    """
    model, preprocessing = trained.model, trained.preprocessing
    if found := list(faults(model.layers)):
        raise ModelFault("; ".join(found))
    takes_tokens = model.layers[0].kind == "embedding"
    is_plain = preprocessing == Preprocessing()
    graph = Graph(onnx, "features")
    _preprocess(graph, preprocessing, model.sample_shape)
    if takes_tokens and not is_plain:
        graph.add("Cast", to=onnx.TensorProto.INT64)
    add_layers(graph, model.layers)
    if model.loss_kind in PREDICTIONS:
        attributes = {"axis": -1} if PREDICTIONS[model.loss_kind] == "Softmax" else {}
        graph.place = "loss"
        graph.add(PREDICTIONS[model.loss_kind], **attributes)
    if graph.constant_bytes > MAX_BYTES:
        raise ModelFault(
            f"model: has {graph.constant_bytes:,} bytes of weights, and an ONNX file of one piece holds "
            f"{MAX_BYTES:,}; use {model_file.FILE_NAME}, which has no such bound"
        )
    graph.nodes[-1].output[0] = "outputs"
    kind = onnx.TensorProto.INT64 if takes_tokens and is_plain else onnx.TensorProto.FLOAT
    made = onnx.helper.make_graph(
        graph.nodes,
        trained.job.name or "model",
        [onnx.helper.make_tensor_value_info("features", kind, ["n", *model.sample_shape])],
        [onnx.helper.make_tensor_value_info("outputs", onnx.TensorProto.FLOAT, ["n", *model.output_shape])],
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
