"""Augmented training under mpirun: the same weights on any number of ranks, in pieces, and after a resume."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import load_file

from worker.data.ahead import is_worth_a_thread

SAMPLES = 90
JOB = {
    "name": "images",
    "data": {
        "validation_fraction": 0.2,
        "standardize": True,
        "augment": {"flip": "horizontal", "shift": 1, "crop": 2},
    },
    "model": [{"conv2d": {"filters": 3, "kernel": 3}}, "relu", {"dense": {"units": 3}}],
    "loss": "softmax_cross_entropy",
    "optimizer": {"momentum": {"learning_rate": 0.01}},
    "training": {"epochs": 4, "batch_size": 16, "seed": 3},
}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(7)
    labels = random.integers(0, 3, SAMPLES)
    images = random.integers(0, 100, (SAMPLES, 8, 7, 3)) + 50 * labels[:, np.newaxis, np.newaxis, np.newaxis]
    np.savez(folder / "data.npz", x=images.astype(np.uint8), y=labels)
    path = folder / "job.json"
    path.write_text(json.dumps(JOB | {"data": JOB["data"] | {"train": {"npz": {"path": str(folder / "data.npz")}}}}))
    return path


def run(run_ranks, ranks, job, output, *options):
    done = run_ranks(ranks, ["-m", "worker", "train", job, "-o", output, *options])
    assert done.returncode == 0, done.stdout + done.stderr
    return load_file(output / "model.safetensors"), json.loads((output / "summary.json").read_text())


def test_augmentation_is_the_same_on_any_number_of_ranks_in_pieces_and_resumed(run_ranks, job, tmp_path):
    weights, summary = run(run_ranks, 1, job, tmp_path / "1")
    run(run_ranks, 1, job, tmp_path / "resumed", "--set", "training.epochs=2")
    others = {
        "2 ranks": run(run_ranks, 2, job, tmp_path / "2"),
        "3 ranks": run(run_ranks, 3, job, tmp_path / "3"),
        "pieces": run(run_ranks, 1, job, tmp_path / "pieces", "--set", "training.micro_batch=3"),
    }
    resumed, _ = run(run_ranks, 1, job, tmp_path / "resumed", "--resume")
    for name, array in weights.items():
        np.testing.assert_array_equal(resumed[name], array, err_msg=name)
        for who, (theirs, _) in others.items():
            scale = np.abs(array).max()
            np.testing.assert_allclose(theirs[name], array, rtol=0, atol=1e-4 * scale, err_msg=f"{who}: {name}")
    plain, _ = run(run_ranks, 1, job, tmp_path / "plain", "--set", "data.augment={}")
    assert any(np.abs(plain[name] - array).max() > 1e-3 * np.abs(array).max() for name, array in weights.items())
    # Another process that knows no training: augmentation of validation samples would show in the last digits.
    done = run_ranks(1, ["-m", "worker", "evaluate", tmp_path / "1", job, "--format", "json"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["loss"] == pytest.approx(summary["validation_loss"], rel=1e-6)


ON_ONE_CORE = (
    "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); sys.argv[0] = 'paceline-worker'; "
)


def test_a_run_that_reads_ahead_leaves_the_same_weights_to_the_bit(run_ranks, tmp_path):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core: nothing is read ahead here")
    side, batch = 128, 96  # 4.7 MB of a batch, enough for a thread
    assert is_worth_a_thread(batch * side * side * 3, cores=2, ranks=1)
    random = np.random.default_rng(1)
    images = random.integers(0, 256, (2 * batch + 9, side, side, 3), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", x=images, y=np.arange(len(images)) % 3)
    description = JOB | {"model": [{"average_pool2d": {"size": 8}}, {"dense": {"units": 3}}]}
    description["data"] = {"train": {"npz": {"path": str(tmp_path / "data.npz")}}} | {
        "scale": 0.004, "augment": JOB["data"]["augment"],
    }  # fmt: skip
    description["training"] = {"epochs": 2, "batch_size": batch}
    (tmp_path / "job.json").write_text(json.dumps(description))
    ahead, _ = run(run_ranks, 1, tmp_path / "job.json", tmp_path / "ahead")
    code = ON_ONE_CORE + "from worker.__main__ import main; main()"
    done = run_ranks(1, ["-c", code, "train", tmp_path / "job.json", "-o", tmp_path / "in-turn"])
    assert done.returncode == 0, done.stdout + done.stderr
    in_turn = load_file(tmp_path / "in-turn" / "model.safetensors")
    for name, array in in_turn.items():
        np.testing.assert_array_equal(ahead[name], array, err_msg=name)
