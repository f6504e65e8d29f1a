"""Initial weights: the same everywhere, of the variance that the following activation wants."""

import subprocess
import sys

import numpy as np
import pytest

from worker.engine.initializers import generator

LOSS = "softmax_cross_entropy"


def test_a_parameter_depends_on_seed_and_name_alone(engine):
    small = engine.build(["dense:8", "relu", "dense:3"], LOSS, (6,), np.float32)
    large = engine.build(["dense:8", "relu", "dense:3", "tanh", "dense:5"], LOSS, (6,), np.float32)
    for made in (small, large):
        made.model.initialize(4)
    shared = small.model.named_parameters()
    for name in ("0.dense.weight", "0.dense.bias"):
        np.testing.assert_array_equal(shared[name], large.model.named_parameters()[name])
    before = small.parameters.copy()
    small.model.initialize(5)
    assert (small.parameters != before)[:48].all()


def test_float64_starts_where_float32_does(engine):
    single, double = (engine.build(["dense:8", "relu", "dense:3"], LOSS, (6,), kind) for kind in (np.float32, float))
    single.model.initialize(1)
    double.model.initialize(1)
    np.testing.assert_array_equal(single.parameters, double.parameters)


@pytest.mark.parametrize(
    ("following", "deviation", "largest"),
    [
        ("relu", np.sqrt(2 / 300), np.inf),
        ("leaky_relu:0.5", np.sqrt(2 / (1.25 * 300)), np.inf),
        ("sigmoid", np.sqrt(2 / 500), np.sqrt(6 / 500)),
        ("tanh", np.sqrt(2 / 500), np.sqrt(6 / 500)),
        ("dense:2", np.sqrt(2 / 500), np.sqrt(6 / 500)),
    ],
)
def test_the_following_layer_decides_between_he_and_glorot(engine, following, deviation, largest):
    made = engine.build(["dense:200", following, "dense:2"], LOSS, (300,), np.float32)
    made.model.initialize(0)
    weight = made.model.named_parameters()["0.dense.weight"]  # 60,000 draws: the deviation is known to about 0.5 %
    assert weight.std() == pytest.approx(deviation, rel=0.015)
    assert abs(weight.mean()) < 4 * deviation / np.sqrt(weight.size)
    assert np.abs(weight).max() <= largest
    assert not made.model.named_parameters()["0.dense.bias"].any()


def test_the_last_dense_layer_takes_glorot(engine):
    made = engine.build(["dense:200"], LOSS, (300,), np.float32)
    made.model.initialize(0)
    assert np.abs(made.model.named_parameters()["0.dense.weight"]).max() <= np.sqrt(6 / 500)


def test_another_process_draws_the_same_numbers():
    program = "from worker.engine.initializers import generator; print(generator(3, '0.dense.weight').random().hex())"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.strip() == generator(3, "0.dense.weight").random().hex()
    assert generator(3, "0.dense.weight").random() != generator(3, "2.dense.weight").random()
