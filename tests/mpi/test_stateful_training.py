"""A small transformer, dropout and all, under mpirun: the same weights on any number of ranks, quiet in evaluation."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.mpi.mpirun import error_lines

SAMPLES, TIME, VOCABULARY = 90, 6, 11

BLOCK = [
    {"residual": {"layers": ["layer_norm", {"attention": {"heads": 2, "causal": True}}, {"dropout": {"rate": 0.1}}]}},
    {
        "residual": {
            "layers": [
                "layer_norm",
                {"linear": {"units": 16}},
                "relu",
                {"linear": {"units": 8}},
                {"dropout": {"rate": 0.2}},
            ]
        }
    },
]
JOB = {
    "name": "tokens",
    "data": {"validation_fraction": 0.2},
    "model": [
        {"embedding": {"vocabulary": VOCABULARY, "units": 8}}, "positions",
        *BLOCK, "layer_norm", {"dense": {"units": 3}},
    ],
    "loss": "softmax_cross_entropy",
    "optimizer": {"momentum": {"learning_rate": 0.05}},
    "training": {"epochs": 4, "batch_size": 16, "seed": 3},
}  # fmt: skip


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    random = np.random.default_rng(7)
    tokens = random.integers(0, VOCABULARY, (SAMPLES, TIME))
    np.savez(folder / "data.npz", x=tokens, y=tokens[:, 0] % 3)
    data = JOB["data"] | {"train": {"npz": {"path": str(folder / "data.npz")}}}
    path = folder / "job.json"
    path.write_text(json.dumps(JOB | {"data": data}))
    return path


def test_a_transformer_with_dropout_trains_alike_on_any_number_of_ranks(run_ranks, job, tmp_path):
    weights, summaries = {}, {}
    for ranks in (1, 2, 3):
        output = tmp_path / str(ranks)
        done = run_ranks(ranks, ["-m", "worker", "train", job, "-o", output])
        assert done.returncode == 0, done.stdout + done.stderr
        weights[ranks] = load_file(output / "model.safetensors")
        summaries[ranks] = json.loads((output / "summary.json").read_text())
    assert "2.residual.1.attention.in_weight" in weights[1]
    for ranks in (2, 3):
        for name, array in weights[ranks].items():
            scale = np.abs(weights[1][name]).max()
            np.testing.assert_allclose(array, weights[1][name], rtol=0, atol=1e-4 * scale, err_msg=name)
        assert summaries[ranks]["validation_loss"] == pytest.approx(summaries[1]["validation_loss"], rel=1e-4)
    # `evaluate` is another process that knows no training: dropout left on anywhere would show in the last digits.
    done = run_ranks(1, ["-m", "worker", "evaluate", tmp_path / "1", job, "--format", "json"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["loss"] == pytest.approx(summaries[1]["validation_loss"], rel=1e-6)


def test_a_token_outside_the_vocabulary_ends_the_job_with_one_line(run_ranks, job, tmp_path):
    small = tmp_path / "small.json"
    description = json.loads(job.read_text())
    description["model"][0]["embedding"]["vocabulary"] = 10
    small.write_text(json.dumps(description))
    done = run_ranks(2, ["-m", "worker", "train", small, "-o", tmp_path / "out"])
    assert done.returncode == 1
    said = error_lines(done.stderr)
    assert len(said) == 1, done.stderr
    assert re.search(r"data\.npz.*: sample \d+ \(counted from 0\) has 10 where a token is expected, a whole", said[0])
    assert not (tmp_path / "out").exists(), "found before the first step"
