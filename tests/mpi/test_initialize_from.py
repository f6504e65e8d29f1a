"""`initialize_from` under mpirun: a run begins where another one ended, and says what it took."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.mpi.mpirun import error_lines

JOB = {
    "data": {"train": {"built_in": "digits"}, "scale": 0.0625},
    "model": [{"dense": {"units": 8}}, "relu", {"dense": {"units": 10}}],
    "loss": "softmax_cross_entropy",
    "optimizer": {"sgd": {"learning_rate": 1e-30}},  # the weights stay what they were at the start
    "training": {"epochs": 1, "batch_size": 0},
}


def start(run_ranks, ranks, folder, name, **changes):
    job = folder / f"{name}.json"
    job.write_text(json.dumps(JOB | changes))
    return run_ranks(ranks, ["-m", "worker", "train", job, "-o", folder / name])


@pytest.fixture
def weights(tmp_path):
    """A whole set of weights for JOB, saved as first.safetensors."""
    random = np.random.default_rng(0)
    shapes = {"0.dense.weight": (64, 8), "0.dense.bias": (8,), "2.dense.weight": (8, 10), "2.dense.bias": (10,)}
    tensors = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "first.safetensors")
    return tensors


@pytest.mark.parametrize("sync", ["all_reduce", "parameter_server"])
def test_a_run_begins_with_the_weights_of_the_file(run_ranks, tmp_path, weights, sync) -> None:
    done = start(run_ranks, 2, tmp_path, "out", initialize_from="first.safetensors", sync=sync)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"initialize_from: 4 parameters taken from {tmp_path}/first.safetensors\n")
    result = load_file(tmp_path / "out" / "model.safetensors")
    assert all(np.array_equal(result[name], weights[name]) for name in weights)
    said = json.loads((tmp_path / "out" / "summary.json").read_text())["initialized"]
    assert said == {"file": f"{tmp_path}/first.safetensors", "fitted": list(weights), "unfitted": []}


def test_what_does_not_fit_is_named_and_begins_as_without_the_file(run_ranks, tmp_path, weights) -> None:
    changed = {"model": [{"dense": {"units": 8}}, "relu", {"dense": {"units": 12}}]}
    done = start(run_ranks, 1, tmp_path, "out", initialize_from="first.safetensors", **changed)
    assert done.returncode == 0, done.stderr
    sentence = "2.dense.weight: has shape (8, 10) in the file and (8, 12) in the model"
    assert f"initialize_from: not taken: {sentence}\n" in done.stdout
    assert start(run_ranks, 1, tmp_path, "plain", **changed).returncode == 0
    result, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    assert np.array_equal(result["0.dense.weight"], weights["0.dense.weight"])
    assert np.array_equal(result["2.dense.weight"], plain["2.dense.weight"])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (None, "is no file"),
        (
            {"encoder.weight": np.ones((2, 2), np.float32)},
            "the file holds encoder.weight: names and shapes must be the same",
        ),
        ({"0.dense.bias": np.full(8, np.inf, np.float32)}, "0.dense.bias holds a value that is not a finite float32"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_message_and_nothing_is_written(
    run_ranks, tmp_path, tensors, message
) -> None:
    if tensors is not None:
        save_file(tensors, tmp_path / "first.safetensors")
    done = start(run_ranks, 2, tmp_path, "out", initialize_from="first.safetensors")
    assert done.returncode == 1
    errors = error_lines(done.stderr)
    assert len(errors) == 1, done.stderr
    assert message in errors[0]
    assert not (tmp_path / "out").exists()
