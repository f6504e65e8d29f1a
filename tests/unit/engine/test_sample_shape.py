"""Samples of two axes: images of one channel to layers that take images, sequences to those that work along an axis."""

import pytest

from protos.job_file import parse_job
from tests.unit.engine.any_layer import example, from_text
from worker.engine.layers import LAYERS
from worker.engine.layers.layer import Takes, traits_of
from worker.engine.model import Model
from worker.engine.sample_shape import implies_channel
from worker.errors import ModelFault

CONV = "{conv2d: {filters: 2, kernel: 3}}"
DENSE = "{dense: {units: 4}}"
CASES = {
    DENSE: True,
    f"flatten, {DENSE}": True,
    f"{CONV}, flatten, {DENSE}": True,
    f"relu, dropout, batch_norm, {CONV}, {DENSE}": True,
    f"{{residual: {{layers: [{CONV}]}}}}, {DENSE}": True,
    f"{{linear: {{units: 3}}}}, relu, {CONV}, {DENSE}": True,
    f"batch_norm, {DENSE}": True,
    f"layer_norm, {DENSE}": False,
    f"positions, attention, {DENSE}": False,
    f"relu, {{residual: {{layers: [layer_norm, attention]}}}}, {DENSE}": False,
    f"{{linear: {{units: 3}}}}, {DENSE}": False,
    f"{{embedding: {{vocabulary: 9, units: 3}}}}, {CONV}, {DENSE}": False,
    f"flatten, layer_norm, {DENSE}": True,
}


def layers_of(model: str):
    text = f"{{data: {{train: {{built_in: digits}}}}, model: [{model}], loss: mean_squared_error, optimizer: sgd}}"
    return parse_job(text)


@pytest.mark.parametrize("model", CASES)
def test_the_layers_that_meet_a_sample_decide_whether_it_is_an_image(model: str) -> None:
    assert implies_channel(layers_of(model).model) == CASES[model]


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if traits_of(LAYERS[kind]).takes is Takes.SEQUENCES])
def test_every_layer_of_sequences_takes_numbers_as_they_are_stored(kind: str) -> None:
    job = layers_of(f"{example(kind)[0]}, {DENSE}")
    assert not implies_channel(job.model)
    assert Model(job.model, job.loss, (10, 8)).sample_shape == (10, 8)


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if traits_of(LAYERS[kind]).takes is Takes.IMAGES])
def test_every_layer_of_images_has_its_lone_channel(kind: str) -> None:
    assert implies_channel([from_text(example(kind)[0])])


def test_an_axis_of_one_value_is_not_normalized() -> None:
    job = layers_of(f"layer_norm, {CONV}, {DENSE}")
    with pytest.raises(
        ModelFault, match=r"model\[0\].layer_norm: got samples of shape \(8, 8, 1\), .*: put flatten before"
    ):
        Model(job.model, job.loss, (8, 8, 1))


@pytest.mark.parametrize("kind", ["attention", "positions"])
def test_who_needs_a_sequence_says_how_it_is_stored(kind: str) -> None:
    job = layers_of(f"{kind}, {DENSE}")
    with pytest.raises(ModelFault, match=r"needs \(time, features\): store samples with these two axes, or put an emb"):
        Model(job.model, job.loss, (10, 8, 1))
