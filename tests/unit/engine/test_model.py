"""The model: faults found before training, buffers that are never mixed up, views that stay views."""

import re
import tracemalloc

import numpy as np
import pytest

from protos import job_pb2
from worker.engine.layers import LAYERS
from worker.engine.layers.dense import Dense
from worker.engine.layers.elementwise import Relu
from worker.engine.losses import LOSSES
from worker.engine.model import Model
from worker.engine.params import decayed_ranges
from worker.errors import DataFault, ModelFault

LOSS = "softmax_cross_entropy"


def test_every_layer_and_loss_of_the_job_file_exists():
    assert list(LAYERS) == [field.name for field in job_pb2.Layer.DESCRIPTOR.fields]
    assert list(LOSSES) == [field.name for field in job_pb2.Loss.DESCRIPTOR.fields]


@pytest.mark.parametrize(
    ("words", "loss", "shape", "message"),
    [
        ([], LOSS, (4,), "model: has no layers"),
        (["relu"], LOSS, (4,), "model: no layer has parameters to train: add a dense layer"),
        (["dense:3", "relu", "dense:0"], LOSS, (4,), "model[2].dense: units: 0 is not at least 1"),
        (["dense:3"], LOSS, (0,), "model[0].dense: got samples of shape (0,), which hold no values"),
        (["softmax", "dense:3"], LOSS, (2, 2, 1), "model[0].softmax: got samples of shape (2, 2, 1), needs one row"),
        (["dense:1"], LOSS, (4,), "loss.softmax_cross_entropy: got 1 output, needs one for each class"),
        (["dense:3", "softmax"], LOSS, (4,), "model[1].softmax: softmax_cross_entropy takes logits"),
        (["dense:1", "sigmoid"], "binary_cross_entropy", (4,), "model[1].sigmoid: binary_cross_entropy takes logits"),
    ],
)
def test_a_model_that_cannot_work_is_refused_by_place(engine, words, loss, shape, message):
    with pytest.raises(ModelFault, match=re.escape(message)):
        Model([engine.layer(word) for word in words], engine.loss_message(loss), shape)


def test_a_layer_or_loss_that_names_nothing_is_refused(engine):
    with pytest.raises(ModelFault, match=re.escape("model[0]: names none of dense, sigmoid")):
        Model([job_pb2.Layer()], engine.loss_message(LOSS), (4,))
    with pytest.raises(ModelFault, match="loss: names none of mean_squared_error"):
        Model([engine.layer("dense:3")], job_pb2.Loss(), (4,))
    bare = job_pb2.Layer(leaky_relu=job_pb2.LeakyReluLayer())
    with pytest.raises(ModelFault, match=re.escape("model[1].leaky_relu: alpha: is absent")):
        Model([engine.layer("dense:3"), bare], engine.loss_message(LOSS), (4,))


def test_slots_lie_in_layer_order_without_gaps_under_the_contract_s_names(engine):
    model = engine.build(["dense:5", "relu", "dense:2"], LOSS, (2, 2, 1)).model
    assert [tuple(slot) for slot in model.slots] == [
        ("0.dense.weight", (4, 5), 0, True),
        ("0.dense.bias", (5,), 20, False),
        ("2.dense.weight", (5, 2), 25, True),
        ("2.dense.bias", (2,), 35, False),
    ]
    assert (model.parameter_count, model.output_shape) == (37, (2,))


def test_the_layout_digest_differs_with_any_name_or_shape(engine):
    variants = [["dense:6", "dense:2"], ["dense:5", "dense:2"], ["dense:6", "relu", "dense:2"]]
    digests = [engine.build(words, LOSS, (4,)).model.layout_digest for words in variants]
    assert len(set(digests)) == 3
    assert digests[0] == engine.build(variants[0], LOSS, (2, 2)).model.layout_digest
    assert re.fullmatch("[0-9a-f]{64}", digests[0])


def test_named_parameters_are_views_of_the_vector(engine):
    made = engine.build(["dense:5", "relu", "dense:2"], LOSS, (4,))
    made.model.named_parameters()["2.dense.bias"][...] = [8, 9]
    assert made.parameters[-2:].tolist() == [8, 9]


@pytest.mark.parametrize("bad", [np.zeros(5), np.zeros((2, 11)), np.zeros(22, np.float32), np.zeros(44)[::2]])
def test_only_a_contiguous_vector_of_the_right_size_and_type_can_be_attached(engine, bad):
    model = engine.build(["dense:4", "dense:2"], LOSS, (2,)).model
    assert model.parameter_count == 22
    with pytest.raises(ValueError, match="needs a contiguous float64 vector of 22 elements"):
        model.attach(np.zeros(22), bad)


def test_no_samples_give_zero_totals_and_a_zero_gradient(engine):
    made = engine.build(["dense:5", "relu", "dense:2"], LOSS, (4,))
    assert made.model.forward(np.empty((0, 4)), np.empty(0, np.int64)) == (0.0, 0.0, 0)
    made.model.backward()
    assert not made.gradient.any()
    assert made.model.outputs(np.empty((0, 4))).shape == (0, 2)


def test_samples_of_another_shape_are_refused(engine):
    model = engine.build(["dense:2"], LOSS, (4,)).model
    with pytest.raises(DataFault, match=re.escape("samples have shape (2, 2), the model was made for (4,)")):
        model.forward(np.zeros((3, 2, 2)), np.zeros(3, np.int64))


def test_backward_belongs_to_the_forward_before_it(engine):
    made = engine.build(["dense:2"], LOSS, (4,))
    features, labels = engine.draw_batch(made.model, 3, 1)
    with pytest.raises(RuntimeError, match="follows forward"):
        made.model.backward()
    made.model.forward(features, labels)
    made.model.outputs(features)
    with pytest.raises(RuntimeError, match="follows forward"):
        made.model.backward()


@pytest.mark.parametrize(
    "words",
    [
        ["sigmoid", "tanh", "dense:3", "sigmoid", "tanh", "relu", "dense:3"],
        ["relu", "dense:4", "leaky_relu:0.2", "sigmoid", "softmax", "tanh", "dense:3", "tanh"],
        ["dense:4", "dense:4", "softmax", "softmax", "dense:3", "leaky_relu:0.1", "relu"],
    ],
)
@pytest.mark.parametrize("loss", ["mean_squared_error", LOSS])
def test_activations_that_work_in_place_never_spoil_what_backward_reads(engine, difference, words, loss):
    made = engine.build(words, loss, (4,))
    features, targets = engine.draw_batch(made.model, 5, 4)
    kept = features.copy()
    direction = np.random.default_rng(9).standard_normal(made.model.parameter_count)
    made.model.forward(features, targets)
    made.model.backward()
    numeric = difference(lambda: made.model.forward(features, targets).loss, made.parameters, direction)
    assert made.gradient @ direction == pytest.approx(numeric, rel=1e-5, abs=1e-8)
    np.testing.assert_array_equal(features, kept)


def test_nothing_before_the_first_trained_layer_costs_a_gradient(engine, monkeypatch):
    """The product with the first weight matrix is the largest of all; its result would be thrown away."""
    asked = []
    original = Dense.backward_input
    monkeypatch.setattr(Dense, "backward_input", lambda self, dy: asked.append(self.units) or original(self, dy))
    monkeypatch.setattr(Relu, "backward_input", lambda self, dy: pytest.fail("the features need no gradient"))
    made = engine.build(["relu", "dense:6", "dense:5", "dense:3"], LOSS, (4,))
    made.model.forward(*engine.draw_batch(made.model, 3, 1))
    made.model.backward()
    assert asked == [3, 5]


def test_batches_of_changing_size_share_buffers_and_give_what_fresh_models_give(engine):
    words = ["dense:6", "tanh", "dense:5", "relu", "dense:3"]
    made = engine.build(words, LOSS, (4,))
    made.model.reserve(8)
    for samples in (8, 3, 1, 8, 0, 13, 5):
        features, labels = engine.draw_batch(made.model, samples, samples)
        fresh = engine.build(words, LOSS, (4,))
        assert made.model.forward(features, labels) == fresh.model.forward(features, labels)
        made.model.backward()
        fresh.model.backward()
        np.testing.assert_array_equal(made.gradient, fresh.gradient)


def test_outputs_are_an_array_of_their_own(engine):
    model = engine.build(["dense:3"], "mean_squared_error", (4,)).model
    features, _ = engine.draw_batch(model, 2, 1)
    first = model.outputs(features)
    kept = first.copy()
    model.outputs(features + 1)
    np.testing.assert_array_equal(first, kept)


def test_a_step_allocates_nothing_big_once_buffers_are_reserved(engine):
    made = engine.build(["dense:256", "relu", "dense:64", "sigmoid", "dense:10"], LOSS, (100,), np.float32)
    made.model.reserve(512)
    features, labels = engine.draw_batch(made.model, 512, 1)
    made.model.forward(features, labels)
    made.model.backward()
    tracemalloc.start()
    made.model.forward(features, labels)
    made.model.backward()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64_000  # one hidden activation alone is 512 KB


def test_values_that_overflow_end_in_a_loss_that_is_not_finite_without_a_warning(engine):
    for loss in ("mean_squared_error", LOSS, "binary_cross_entropy"):
        made = engine.build(["dense:4", "relu", "dense:3"], loss, (4,), np.float32)
        made.parameters *= 1e30
        features, targets = engine.draw_batch(made.model, 5, 1)
        assert not np.isfinite(made.model.forward(features, targets).loss)
        made.model.backward()


def test_decayed_ranges_of_a_slice_are_its_weights_counted_from_its_start(engine):
    slots = engine.build(["dense:5", "relu", "dense:2"], LOSS, (4,)).model.slots  # weights at 0..20 and 25..35
    assert decayed_ranges(slots, 0, 37) == [(0, 20), (25, 35)]
    assert decayed_ranges(slots, 10, 30) == [(0, 10), (15, 20)]
    assert decayed_ranges(slots, 20, 25) == []
