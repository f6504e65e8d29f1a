"""What cannot work ends every rank with one line that names who, value and remedy, before anything is written."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from safetensors.numpy import save_file

from tests.mpi.mpirun import error_lines

FAILED, BAD_JOB = 1, 2
DENSE = {"dense": {"units": 10}}
TOKENS = {"embedding": {"vocabulary": 256, "units": 10}}
LINEAR = {"linear": {"units": 256}}


def text(context: int) -> dict:
    return {"train": {"text": {"path": "text.txt", "context": context}}}


# What a job says in place of its own, the exit code, and what is said of it.
CASES = {
    "shapes": (
        {"model": [{"dense": {"units": 8}}, {"conv2d": {"filters": 4, "kernel": 3}}, DENSE]},
        *(FAILED, "model[1].conv2d: got samples of shape (8,), needs images (height, width, channels)"),
    ),
    "guests of running statistics": (
        {"model": [{"dense": {"units": 8}}, "batch_norm", DENSE], "sync": {"parameter_server": {"guests": True}}},
        *(BAD_JOB, "sync.parameter_server.guests: true beside running statistics (batch_norm), which guests do not"),
    ),
    "kernel larger than its image": (
        {"model": [{"conv2d": {"filters": 4, "kernel": 9}}, DENSE]},
        *(FAILED, "model[0].conv2d: kernel: 9 x 9 is larger than its image, got samples of shape (8, 8, 1); needs at"),
    ),
    "kernel of three": (
        {"model": [{"conv2d": {"filters": 4, "kernel": [3, 3, 3]}}, DENSE]},
        *(BAD_JOB, "model[0].conv2d.kernel: has 3 elements, which is not at most 2"),
    ),
    "token": (
        {"model": [{"embedding": {"vocabulary": 10, "units": 4}}, DENSE]},
        *(FAILED, "built-in digits: sample 0 (counted from 0) has 13 where a token is expected, a whole number"),
    ),
    "parquet column": (
        {"data": {"train": {"parquet": {"path": "table.parquet", "target": "nope"}}}},
        *(FAILED, "table.parquet: has no column 'nope'; the columns are: a, b"),
    ),
    "no initial weights": (
        {"initialize_from": "absent.safetensors"},
        *(FAILED, "absent.safetensors: is no file; check the path in the job file"),
    ),
    "initial weights of another kind": (
        {"initialize_from": "text.txt"},
        *(FAILED, "text.txt: is damaged"),
    ),
    "initial weights that fit nothing": (
        {"initialize_from": "other.safetensors"},
        *(
            FAILED,
            "nothing fits the model: 0.dense.weight: is not in the file; 0.dense.bias: is not in the file; the file",
        ),
    ),
    "metric": ({"metrics": ["r2"]}, BAD_JOB, "metrics: r2 cannot be told of labels"),
    "metric's setting": (
        {"metrics": [{"top_k_accuracy": {"k": 11}}]},
        *(FAILED, "metrics[0].top_k_accuracy.k: 11 is more than the 10 classes of the model"),
    ),
    "class weights": (
        {"loss": {"softmax_cross_entropy": {"class_weights": [1, 2]}}},
        *(FAILED, "loss.softmax_cross_entropy: class_weights: are 2, but the model has 10 outputs: give each one"),
    ),
    "dropout": ({"model": [{"dropout": {"rate": 1}}, DENSE]}, BAD_JOB, "model[0].dropout.rate: 1 is not below 1"),
    "heads": (
        {"data": text(4), "model": [TOKENS, {"attention": {"heads": 3}}, LINEAR]},
        *(FAILED, "model[1].attention: heads: 3 does not divide the 10 features of a sample"),
    ),
    "context": (
        {"data": text(1000), "model": [TOKENS, LINEAR]},
        *(FAILED, "text.txt: holds 24 bytes, too few for a sample of 1001; name a longer text or set context to 23"),
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("hello\n" * 4)
    parquet.write_table(pa.table({"a": [1, 2, 3], "b": [0, 1, 0]}), tmp_path / "table.parquet")
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    return tmp_path


@pytest.mark.parametrize("case", CASES)
def test_one_line_says_it_and_nothing_is_written(run_ranks, folder, case) -> None:
    changes, code, said = CASES[case]
    job = {
        "data": {"train": {"built_in": "digits"}, "validation_fraction": 0.2},
        "model": [DENSE],
        "loss": "softmax_cross_entropy",
        "optimizer": "sgd",
    }
    (folder / "job.json").write_text(json.dumps(job | changes))
    done = run_ranks(2, ["-m", "worker", "train", folder / "job.json", "-o", folder / "out"])
    assert done.returncode == code, done.stderr
    errors = error_lines(done.stderr)
    assert len(errors) == 1, done.stderr
    assert said in errors[0]
    assert "Traceback" not in done.stderr
    assert not (folder / "out").exists()


def test_a_model_larger_than_memory_is_one_line(run_ranks, folder) -> None:
    layers = [{"dense": {"units": 1_000_000}}, {"dense": {"units": 1_000_000}}, DENSE]  # 4 TB
    job = {
        "data": {"train": {"built_in": "digits"}},
        "model": layers,
        "loss": "softmax_cross_entropy",
        "optimizer": "sgd",
    }
    (folder / "job.json").write_text(json.dumps(job))
    done = run_ranks(1, ["-m", "worker", "train", folder / "job.json", "-o", folder / "out"])
    assert done.returncode == FAILED
    said = r"error: out of memory: .*; make the model or training.batch_size smaller"
    assert any(re.match(said, line) for line in error_lines(done.stderr)), done.stderr
    assert "Traceback" not in done.stderr


def test_a_loss_that_is_finite_and_enormous_ends_the_run_at_its_step(run_ranks, folder) -> None:
    job = {
        "data": {"train": {"built_in": "digits"}},
        "model": [{"dense": {"units": 32}}, "relu", DENSE],
        "loss": "softmax_cross_entropy",
        "optimizer": {"adam": {"learning_rate": 1e6}},
        "training": {"epochs": 5},
    }
    (folder / "job.json").write_text(json.dumps(job))
    done = run_ranks(2, ["-m", "worker", "train", folder / "job.json", "-o", folder / "out"])
    assert done.returncode == FAILED
    assert re.search(r"error: .*step \d+ \(epoch 1\): the loss is [\d.e+]+; lower the learning rate", done.stderr)
