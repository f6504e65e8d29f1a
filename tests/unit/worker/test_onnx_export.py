"""The exported graph says what the model says, in onnxruntime."""

import re
from pathlib import Path

import numpy as np
import pytest

from protos.job_file import parse_job
from worker import onnx_export
from worker.data.preprocessing import Preprocessing
from worker.engine.layers import LAYERS
from worker.engine.model import Model
from worker.errors import ModelFault
from worker.model_file import TrainedModel, write_model

INSTALL = "is not installed: pip install onnx onnxruntime"
onnx = pytest.importorskip("onnx", reason=f"onnx {INSTALL}")
runtime = pytest.importorskip("onnxruntime", reason=f"onnxruntime {INSTALL}")

SHAPE = (7, 6, 2)
SCALED = Preprocessing(scale=0.5)
STANDARDIZED = Preprocessing(mean=tuple(np.linspace(-1, 1, 84)), deviation=tuple(np.linspace(0.5, 2, 84)))
MODELS = {
    **{kind: f"dense: {{units: 6}}, {kind}, dense: {{units: 4}}" for kind in
       ("sigmoid", "tanh", "relu", "leaky_relu", "softmax", "gelu", "silu", "elu", "softplus")},
    "dense": "dense: {units: 4, bias: false}",
    "flatten": "flatten, dense: {units: 4}",
    "conv2d": "conv2d: {filters: 3, kernel: [3, 2], stride: 2, padding: same}, dense: {units: 4}",
    "max_pool2d": "max_pool2d: {size: 3, stride: 2, padding: same}, dense: {units: 4}",
    "average_pool2d": "average_pool2d: {size: 3, stride: 2, padding: same}, dense: {units: 4}",
    "global_average_pool": "conv2d: {filters: 4, kernel: 3, bias: false}, global_average_pool, dense: {units: 4}",
}  # fmt: skip


def trained(layers, loss, preprocessing):
    items = re.sub(r"(\w+: \{[^}]*\})", r"{\1}", layers)
    job = parse_job(f"{{data: {{train: {{built_in: digits}}}}, model: [{items}], loss: {loss}, optimizer: sgd}}")
    model = Model(job.model, job.loss, SHAPE)
    model.attach(np.random.default_rng(1).normal(0, 0.5, model.parameter_count).astype(np.float32))
    return TrainedModel(model, preprocessing, job)


def test_every_layer_that_has_an_onnx_form_is_checked_here():
    assert set(MODELS) == set(onnx_export.NODES)
    assert set(onnx_export.NODES) <= set(LAYERS)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("loss", "preprocessing"),
    [("softmax_cross_entropy", SCALED), ("binary_cross_entropy", STANDARDIZED), ("huber", Preprocessing())],
)
def test_onnxruntime_gives_the_same_outputs(kind, loss, preprocessing):
    made = trained(MODELS[kind], loss, preprocessing)
    raw = np.random.default_rng(2).standard_normal((5, *SHAPE)).astype(np.float32)
    features = np.empty_like(raw)
    made.preprocessing.apply(raw, features)
    session = runtime.InferenceSession(onnx_export.to_onnx(onnx, made).SerializeToString())
    (outputs,) = session.run(["outputs"], {"features": raw})
    np.testing.assert_allclose(outputs, made.model.outputs(features), rtol=1e-5, atol=1e-5)


def test_export_writes_the_graph_of_a_finished_run(tmp_path: Path):
    made = trained(MODELS["relu"], "huber", SCALED)
    write_model(tmp_path, made.job, made.model, SCALED)
    onnx_export.export_folder(tmp_path, tmp_path / "model.onnx")
    assert onnx.load(tmp_path / "model.onnx") == onnx_export.to_onnx(onnx, made)


def test_a_layer_without_an_onnx_form_is_refused_by_name_before_anything_is_written(tmp_path, monkeypatch):
    made = trained(MODELS["relu"], "huber", SCALED)
    write_model(tmp_path, made.job, made.model, SCALED)
    monkeypatch.delitem(onnx_export.NODES, "relu")
    with pytest.raises(ModelFault, match=re.escape("model[1].relu: has no ONNX form")):
        onnx_export.export_folder(tmp_path, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()
