"""Layers within layers: names, initial values, places in messages, and a whole transformer's gradient."""

import re
import tracemalloc

import numpy as np
import pytest

from protos import job_pb2
from worker.engine.layers.layer import Moment
from worker.engine.model import Model
from worker.errors import ModelFault

LOSS = job_pb2.Loss(softmax_cross_entropy=job_pb2.SoftmaxCrossEntropyLoss())
NORM = {"layer_norm": {"epsilon": 1e-5}}
DROPOUT = {"dropout": {"rate": 0.25}}
ATTENTION = {"attention": {"heads": 2, "causal": True}}


def build(layers, shape, dtype=np.float64):
    """A model of layers written as in a job file, with its vectors."""
    model = Model([job_pb2.Layer(**layer) for layer in layers], LOSS, shape, dtype)
    parameters = np.zeros(model.parameter_count, dtype)
    gradient = np.full(model.parameter_count, np.nan, dtype)
    model.attach(parameters, gradient)
    model.initialize(3)
    return model, parameters, gradient


def transformer(vocabulary, units, width):
    block = [
        {"residual": {"layers": [NORM, ATTENTION, DROPOUT]}},
        {"residual": {"layers": [NORM, {"linear": {"units": width}}, {"relu": {}}, {"linear": {"units": units}}]}},
    ]
    embedding = {"embedding": {"vocabulary": vocabulary, "units": units}}
    return [embedding, {"positions": {}}, DROPOUT, *block, NORM, {"dense": {"units": 3, "bias": True}}]


def test_parameters_inside_are_named_by_the_way_to_them():
    model, _, _ = build(
        [
            {"dense": {"units": 4, "bias": True}},
            {"residual": {"layers": [NORM, {"dense": {"units": 4, "bias": True}}]}},
        ],
        (3,),
    )
    assert [(slot.name, slot.decayed) for slot in model.slots] == [
        ("0.dense.weight", True),
        ("0.dense.bias", False),
        ("1.residual.0.layer_norm.weight", False),
        ("1.residual.0.layer_norm.bias", False),
        ("1.residual.1.dense.weight", True),
        ("1.residual.1.dense.bias", False),
    ]
    named = model.named_parameters()
    assert (named["1.residual.0.layer_norm.weight"] == 1).all()
    assert not named["1.residual.0.layer_norm.bias"].any()


def test_a_weight_inside_is_drawn_for_the_layer_behind_it():
    """He's normal values are not bounded, Glorot's stay within sqrt(6 / (in + out))."""
    inside = [{"linear": {"units": 200}}, {"relu": {}}, {"linear": {"units": 100}}]
    named = build([{"residual": {"layers": inside}}, {"dense": {"units": 3, "bias": True}}], (1, 100))[
        0
    ].named_parameters()
    limit = np.sqrt(6 / 300)
    assert np.abs(named["0.residual.0.linear.weight"]).max() > limit
    assert named["0.residual.0.linear.weight"].std() == pytest.approx(np.sqrt(2 / 100), rel=0.03)
    assert np.abs(named["0.residual.2.linear.weight"]).max() <= limit


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            [{"residual": {"layers": [NORM, {"residual": {"layers": [{"linear": {"units": 0}}]}}]}}],
            "model[0].residual.layers[1].residual.layers[0].linear: units: 0 is not at least 1",
        ),
        (
            [{"residual": {"layers": [{"dense": {"units": 5, "bias": True}}]}}],
            "model[0].residual: got samples of shape (4,), and its layers make (5,) of them",
        ),
        (
            [NORM, {"embedding": {"vocabulary": 2, "units": 2}}],
            "model[1].embedding: takes tokens, so it must be the first layer of the model",
        ),
    ],
)
def test_a_fault_inside_is_named_by_its_place_in_the_job_file(layers, message):
    with pytest.raises(ModelFault, match=re.escape(message)):
        build(layers, (4,))


def test_a_transformer_s_gradient_equals_the_difference(difference):
    model, parameters, gradient = build(transformer(7, 4, 6), (5,))
    random = np.random.default_rng(1)
    parameters += 0.3 * random.standard_normal(len(parameters))
    tokens, labels = random.integers(0, 7, (6, 5)).astype(np.float64), random.integers(0, 3, 6)
    direction = random.standard_normal(len(parameters))
    moment = Moment(seed=1, step=2, first=3)
    model.forward(tokens, labels, moment)
    model.backward()
    numeric = difference(lambda: model.forward(tokens, labels, moment).loss, parameters, direction)
    assert gradient @ direction == pytest.approx(numeric, rel=1e-6)
    # Evaluation drops nothing and says so: it is the same however often it is asked.
    assert model.forward(tokens, labels).loss == model.forward(tokens, labels).loss
    assert model.forward(tokens, labels).loss != model.forward(tokens, labels, moment).loss


def test_a_transformer_s_step_allocates_little_once_buffers_are_reserved():
    model, _, _ = build(transformer(50, 32, 64), (64,), np.float32)
    random = np.random.default_rng(1)
    tokens, labels = random.integers(0, 50, (32, 64)).astype(np.float32), random.integers(0, 3, 32)
    model.reserve(32)
    for step in (1, 2):
        tracemalloc.start()
        model.forward(tokens, labels, Moment(1, step, 0))
        model.backward()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 400_000  # one activation alone is 262 KB; random bits and sorted tokens take slices of less
