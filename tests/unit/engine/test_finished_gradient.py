"""While backward runs it says from which element on the gradient is finished: that is true, and changes nothing."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from protos.job_file import parse_job
from protos.rules import resolve
from worker.accumulation import Accumulator
from worker.engine.layers.layer import Moment
from worker.engine.model import Model
from worker.measurements import Meter

SAMPLES = 10
NORM = {"batch_norm": {}}
CONVOLUTION = {"conv2d": {"filters": 4, "kernel": 3, "padding": "same"}}
BLOCK = {"residual": {"layers": ["layer_norm", {"attention": {"heads": 2}}]}}
# name: layers, shape of a sample.
MODELS = {
    "dense": ([{"dense": {"units": 8}}, "relu", {"dense": {"units": 3}}], (6,)),
    "no bias, and biases that are cancelled": (
        [{"dense": {"units": 8, "bias": False}}, NORM, "relu", {"dense": {"units": 5}}, NORM, {"dense": {"units": 3}}],
        (6,),
    ),
    # ReLU and pooling change places; the residual layers hold two layers with parameters, the inner one holds another.
    "images": (
        [
            CONVOLUTION, "relu", {"max_pool2d": {"size": 2}},
            {"residual": {"layers": [CONVOLUTION, NORM, "relu", {"residual": {"layers": [CONVOLUTION]}}]}},
            "flatten", {"dense": {"units": 3}},
        ],
        (6, 6, 2),
    ),
    "tokens": (
        [{"embedding": {"vocabulary": 11, "units": 4}}, "positions", BLOCK, "layer_norm", {"linear": {"units": 11}}],
        (5,),
    ),
}  # fmt: skip


def make(name: str) -> SimpleNamespace:
    """A model with random parameters and a gradient full of nan, and samples for it."""
    layers, shape = MODELS[name]
    job = {"data": {"train": {"built_in": "digits"}}, "model": layers, "loss": "softmax_cross_entropy"}
    job = resolve(parse_job(json.dumps(job | {"optimizer": "sgd"})))
    model = Model(job.model, job.loss, shape)
    gradient = np.full(model.parameter_count, np.nan, np.float32)
    model.attach(np.zeros(model.parameter_count, np.float32), gradient)
    model.initialize(3)
    random = np.random.default_rng(1)
    features = random.standard_normal((SAMPLES, *shape)).astype(np.float32)
    targets = random.integers(0, 3, SAMPLES)
    if name == "tokens":
        features = random.integers(0, 11, (SAMPLES, *shape)).astype(np.float32)
        targets = random.integers(0, 11, (SAMPLES, *shape))
    return SimpleNamespace(model=model, gradient=gradient, features=features, targets=targets)


class Reader:
    """Hands samples out as a BatchReader does."""

    def __init__(self, made: SimpleNamespace) -> None:
        self.made = made

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.made.features[indices], self.made.targets[indices]

    def prepare(self, indices: np.ndarray) -> None:
        """Nothing is read ahead."""


def accumulate(made: SimpleNamespace, micro_batch: int, finished=None, samples: int = SAMPLES) -> np.ndarray:
    accumulator = Accumulator(made.model, made.gradient, SAMPLES, micro_batch, finished)
    meter = Meter()
    meter.start_step()
    accumulator.compute(Reader(made), np.arange(samples), np.arange(0), Moment(1, 1, 0), meter)
    return made.gradient.copy()


@pytest.mark.parametrize("samples", [SAMPLES, 3, 0])
@pytest.mark.parametrize("micro_batch", [0, 4])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_said_to_be_finished_has_its_last_value(name: str, micro_batch: int, samples: int) -> None:
    made = make(name)
    said: list[tuple[int, np.ndarray]] = []
    result = accumulate(
        made, micro_batch, lambda first: said.append((first, made.gradient[first:].copy())), samples=samples
    )
    for first, finished in said:
        np.testing.assert_array_equal(finished, result[first:])
    places = [first for first, _ in said]
    assert places == sorted(places, reverse=True)
    assert places[-1] == 0
    if samples:
        begins: dict[str, int] = {}
        for slot in made.model.slots:
            begins.setdefault(slot.name.rpartition(".")[0], slot.offset)
        assert set(places) == set(begins.values()), "a layer with parameters did not say that it had finished"
    unsaid = accumulate(make(name), micro_batch, samples=samples)
    np.testing.assert_array_equal(result, unsaid)
