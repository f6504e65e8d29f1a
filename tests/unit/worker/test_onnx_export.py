"""The exported graph says what the model says, in onnxruntime: each layer, whole models, any number of samples."""

import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.job_file import parse_job
from worker import onnx_export, onnx_layers
from worker.data.preprocessing import Preprocessing
from worker.engine.layers import LAYERS
from worker.engine.losses import LOSSES
from worker.engine.model import Model
from worker.errors import CheckpointFault, ModelFault, OutputFault, UsageFault
from worker.model_file import TrainedModel, write_model

INSTALL = "is not installed: pip install onnx onnxruntime"
onnx = pytest.importorskip("onnx", reason=f"onnx {INSTALL}")
runtime = pytest.importorskip("onnxruntime", reason=f"onnxruntime {INSTALL}")

IMAGE = (7, 6, 2)
SEQUENCE = (6, 14)
PLAIN = Preprocessing()
SCALED = Preprocessing(scale=0.5)
STANDARDIZED = Preprocessing(mean=tuple(np.linspace(-1, 1, 84)), deviation=tuple(np.linspace(0.5, 2, 84)))

ACTIVATIONS = ("sigmoid", "tanh", "relu", "leaky_relu", "softmax", "gelu", "silu", "elu", "softplus")
LAST = "{dense: {units: 4}}"
MODELS = {
    **{kind: (IMAGE, f"{{dense: {{units: 6}}}}, {kind}, {LAST}") for kind in ACTIVATIONS},
    "dense": (IMAGE, "{dense: {units: 4, bias: false}}"),
    "flatten": (IMAGE, f"flatten, {LAST}"),
    "conv2d": (IMAGE, f"{{conv2d: {{filters: 3, kernel: [3, 2], stride: 2, padding: same}}}}, {LAST}"),
    "max_pool2d": (IMAGE, f"{{max_pool2d: {{size: 3, stride: 2, padding: same}}}}, {LAST}"),
    "average_pool2d": (IMAGE, f"{{average_pool2d: {{size: 3, stride: 2, padding: same}}}}, {LAST}"),
    "global_average_pool": (IMAGE, f"{{conv2d: {{filters: 4, kernel: 3, bias: false}}}}, global_average_pool, {LAST}"),
    "layer_norm": (SEQUENCE, f"{{layer_norm: {{epsilon: 0.01}}}}, {LAST}"),
    "batch_norm": (IMAGE, f"{{batch_norm: {{epsilon: 0.01}}}}, {LAST}"),
    "residual": (SEQUENCE, f"{{residual: {{layers: [layer_norm, {{residual: {{layers: [relu]}}}}]}}}}, {LAST}"),
    "dropout": (SEQUENCE, f"dropout, {LAST}, dropout"),
    "positions": (SEQUENCE, f"positions, {LAST}"),
    "linear": (SEQUENCE, f"{{linear: {{units: 3}}}}, {LAST}"),
    "attention": (SEQUENCE, f"{{attention: {{heads: 7, causal: true}}}}, {LAST}"),
}  # fmt: skip
TOKENS = {"embedding": ((5,), f"{{embedding: {{vocabulary: 11, units: 3}}}}, {LAST}")}

BLOCK = """
  {residual: {layers: [layer_norm, {attention: {heads: 4, causal: true}}, {dropout: {rate: 0.1}}]}},
  {residual: {layers: [layer_norm, {linear: {units: 64}}, gelu, {linear: {units: 16}}, dropout]}},
"""
TRANSFORMER = (
    f"{{embedding: {{vocabulary: 256, units: 16}}}}, positions, {BLOCK} {BLOCK} layer_norm, {{linear: {{units: 256}}}}"
)
CNN = """
  {conv2d: {filters: 8, kernel: 3, padding: same}}, relu, {max_pool2d: {size: 2}}, dropout,
  {residual: {layers: [{conv2d: {filters: 8, kernel: 3, padding: same}}, silu]}},
  {average_pool2d: {size: 2, stride: 1}}, flatten, {dense: {units: 10}}
"""


def trained(shape, layers, loss="huber", preprocessing=PLAIN, deviation=0.5):
    """A model with random parameters; with a deviation of 0 as it is initialized, and no bias 0."""
    job = parse_job(f"{{data: {{train: {{built_in: digits}}}}, model: [{layers}], loss: {loss}, optimizer: sgd}}")
    model = Model(job.model, job.loss, shape)
    parameters = np.zeros(model.parameter_count, np.float32)
    model.attach(parameters)
    if deviation == 0:
        model.initialize(seed=3)
    parameters += np.random.default_rng(1).normal(0, deviation or 0.02, model.parameter_count).astype(np.float32)
    for values in model.named_state().values():
        values[...] = np.random.default_rng(4).uniform(0.5, 2, values.shape)
    return TrainedModel(model, preprocessing, job)


def numbers(shape, samples=5):
    return np.random.default_rng(2).standard_normal((samples, *shape)).astype(np.float32)


def tokens(shape, vocabulary, samples=5):
    return np.random.default_rng(2).integers(0, vocabulary, (samples, *shape))


def check(made, raw):
    """Equal to the model to 1e-5 of the largest output, or of 1; declared shapes are those that inference finds."""
    graph = onnx_export.to_onnx(onnx, made)
    declared = onnx.helper.make_tensor_value_info("outputs", onnx.TensorProto.FLOAT, ["n", *made.model.output_shape])
    assert list(graph.graph.output) == [declared]
    bare = onnx.ModelProto()
    bare.CopyFrom(graph)
    bare.graph.output[0].type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(bare, check_type=True, strict_mode=True, data_prop=True)
    assert list(inferred.graph.output) == [declared]

    features = np.empty(raw.shape, np.float32)
    made.preprocessing.apply(raw, features)
    session = runtime.InferenceSession(graph.SerializeToString())
    (outputs,) = session.run(["outputs"], {"features": raw})
    expected = made.model.outputs(features)
    largest = np.abs(expected).max(initial=1)
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-5 * largest)


def test_onnx_forms_and_reasons_why_not_are_of_layers_there_are_and_of_each_one_of_them():
    """A new layer may have neither: then export says so."""
    assert set(onnx_layers.NODES) | set(onnx_layers.WITHOUT_FORM) <= set(LAYERS)
    assert not set(onnx_layers.NODES) & set(onnx_layers.WITHOUT_FORM)


def test_every_layer_that_has_an_onnx_form_is_checked_here():
    assert set(MODELS) | set(TOKENS) == set(onnx_layers.NODES)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("loss", "preprocessing"), [("softmax_cross_entropy", SCALED), ("binary_cross_entropy", STANDARDIZED)]
)
def test_onnxruntime_gives_the_same_outputs(kind, loss, preprocessing):
    shape, layers = MODELS[kind]
    check(trained(shape, layers, loss, preprocessing), numbers(shape))


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_predicts_the_same(loss):
    check(trained(*MODELS["tanh"], loss), numbers(IMAGE))


@pytest.mark.parametrize("activation", sorted({*ACTIVATIONS} - {"softmax"}))
def test_activations_are_the_same_far_from_0_too(activation):
    made = trained((9,), f"{activation}, {LAST}", deviation=0)
    check(made, np.array([[-100, -20, -5, -1e-3, 0, 1e-3, 5, 20, 100]], np.float32))


def test_tokens_are_whole_numbers_as_they_are_stored():
    made = trained(*TOKENS["embedding"])
    check(made, tokens((5,), 11))
    assert onnx_export.to_onnx(onnx, made).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.INT64


def test_tokens_that_are_made_by_preprocessing_are_numbers_until_then():
    check(trained(*TOKENS["embedding"], preprocessing=SCALED), tokens((5,), 11).astype(np.float32) * 2)


@pytest.mark.parametrize("samples", [0, 1, 7])
def test_a_byte_transformer_says_the_same_for_any_number_of_samples(samples):
    made = trained((12,), TRANSFORMER, "softmax_cross_entropy", deviation=0)
    check(made, tokens((12,), 256, samples))


@pytest.mark.parametrize("samples", [0, 1, 7])
def test_a_convolutional_network_says_the_same_for_any_number_of_samples(samples):
    made = trained((12, 10, 3), CNN, "softmax_cross_entropy", SCALED, deviation=0)
    check(made, numbers((12, 10, 3), samples))


def test_convolutions_by_winograd_of_raw_pixels_say_the_same():
    """Sums of 288 products of pixels from 0 to 255, by another way than the runtime's."""
    convolutions = ", relu, ".join(["{conv2d: {filters: 32, kernel: 3, padding: same}}"] * 2)
    made = trained((9, 8, 32), f"{convolutions}, flatten, {LAST}", deviation=0)
    assert all(placed.layer.is_winograd for placed in made.model.layers if placed.kind == "conv2d")
    check(made, np.random.default_rng(2).integers(0, 256, (5, 9, 8, 32)).astype(np.float32))


SIZES = st.integers(1, 6)
BOOLEANS = st.sampled_from(["true", "false"])


@settings(max_examples=15, deadline=None)
@given(time=SIZES, heads=SIZES, width=SIZES, causal=BOOLEANS)
def test_attention_of_any_shape(time, heads, width, causal):
    shape = (time, heads * width)
    layers = f"{{attention: {{heads: {heads}, causal: {causal}}}}}, {LAST}"
    check(trained(shape, layers, deviation=0), numbers(shape))


@settings(max_examples=15, deadline=None)
@given(shape=st.lists(SIZES, min_size=1, max_size=3), units=SIZES)
def test_layers_over_the_last_axis_of_any_shape(shape, units):
    """One feature alone is normalized to 0 whatever it is, so the layer before it makes more."""
    layers = f"{{linear: {{units: {units + 1}}}}}, {{residual: {{layers: [{{layer_norm: {{epsilon: 0.01}}}}, gelu]}}}}"
    check(trained(tuple(shape), f"{layers}, {LAST}", deviation=0), numbers(shape))


@settings(max_examples=25, deadline=None)
@given(
    image=st.tuples(st.integers(3, 9), st.integers(3, 9), SIZES),
    window=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.sampled_from(["same", "valid"]),
    kind=st.sampled_from(["conv2d: {filters: 3, kernel: ", "max_pool2d: {size: ", "average_pool2d: {size: "]),
)
def test_windows_of_any_shape(image, window, stride, padding, kind):
    layers = f"{{{kind}{list(window)}, stride: {list(stride)}, padding: {padding}}}}}, {LAST}"
    check(trained(image, layers, deviation=0), numbers(image))


def test_the_graph_carries_the_names_of_the_model_and_an_opset_that_runtimes_since_2022_read():
    made = trained((12,), TRANSFORMER, "softmax_cross_entropy")
    graph = onnx_export.to_onnx(onnx, made)
    assert (graph.opset_import[0].version, graph.ir_version) == (17, 8)
    sizes = {held.name: math.prod(held.dims) for held in graph.graph.initializer}
    parts = {name: re.sub(r"\.(query|key|value)$", "", name) for name in sizes}
    for name, values in made.model.named_parameters().items():
        assert sum(size for part, size in sizes.items() if parts[part] == name) == values.size
    masks = [held for held in graph.graph.initializer if list(held.dims) == [12, 12]]
    assert len(masks) == 1  # both attention layers read it
    names = [node.name for node in graph.graph.node]
    assert len(set(names)) == len(names)
    assert "2.residual.1.attention/Softmax" in names


# ------------------------------------------------------------------------------------------------- the file, and faults


@pytest.fixture
def folder(tmp_path: Path):
    made = trained(*MODELS["residual"], preprocessing=SCALED)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    write_model(tmp_path / "run", made.job, made.model, SCALED)
    return tmp_path / "run"


def files(folder):
    return {path.name: path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()}


def refused(folder, path, fault, code, message):
    """The message, the exit code, and no file made or changed."""
    before = files(folder)
    with pytest.raises(fault, match=re.escape(message)) as caught:
        onnx_export.export_folder(folder, path)
    assert caught.value.exit_code == code
    assert "\n" not in str(caught.value)
    assert files(folder) == before


def test_export_writes_the_graph_of_a_finished_run_over_an_older_one(folder):
    path = folder / "model.onnx"
    path.write_text("older")
    onnx_export.export_folder(folder, path)
    made = trained(*MODELS["residual"], preprocessing=SCALED)
    assert onnx.load(path) == onnx_export.to_onnx(onnx, made)
    assert set(files(folder)) == {"model.safetensors", "model.onnx"}


def test_a_layer_that_nobody_has_written_a_form_for_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(onnx_layers.NODES, "gelu")
    with pytest.raises(ModelFault, match=r"model\[0\].gelu: has no ONNX form"):
        onnx_export.to_onnx(onnx, trained(SEQUENCE, f"gelu, {LAST}"))


def test_a_layer_without_an_onnx_form_is_refused_by_name_and_reason(folder, monkeypatch):
    monkeypatch.setitem(onnx_layers.WITHOUT_FORM, "relu", "it is for the test")
    message = "model[0].residual.layers[1].residual.layers[0].relu: has no ONNX form: it is for the test"
    refused(folder, folder / "model.onnx", ModelFault, 1, message)


def test_a_model_larger_than_an_onnx_file_is_refused(folder, monkeypatch):
    monkeypatch.setattr(onnx_export, "MAX_BYTES", 1000)
    message = "an ONNX file of one piece holds 1,000; use model.safetensors"
    refused(folder, folder / "model.onnx", ModelFault, 1, message)


def test_without_onnx_the_message_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    refused(folder, folder / "model.onnx", UsageFault, 2, "export needs the onnx package: pip install 'paceline[onnx]'")


@pytest.mark.parametrize(
    ("name", "fault", "code", "message"),
    [
        ("model.safetensors", OutputFault, 2, "model.safetensors: belongs to the run; name another file with --onnx"),
        ("checkpoints/step-000000001.safetensors", OutputFault, 2, "belongs to the run; name another file with --onnx"),
        ("../run", OutputFault, 2, "is a folder; name another file with --onnx"),
        ("none/model.onnx", OutputFault, 2, "none: is not a folder; make it, or name another file with --onnx"),
        ("model.safetensors/m.onnx", OutputFault, 2, "model.safetensors: is not a folder"),
        ("m" * 255, CheckpointFault, 1, "File name too long; free some space or name another file with --onnx"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused(folder, name, fault, code, message):
    refused(folder, folder / name, fault, code, message)


def test_a_folder_that_holds_no_run_is_refused(folder):
    (folder / "empty").mkdir()
    refused(folder / "empty", folder / "model.onnx", CheckpointFault, 1, "name the output folder of a finished run")
