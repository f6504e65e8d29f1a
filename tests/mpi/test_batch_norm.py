"""Batch normalization under mpirun: synchronized, any number of ranks gives what one gives; the state goes everywhere.

The batches are cut so that shares are uneven, and the last of an epoch leaves ranks without a sample.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

SAMPLES, HELD_OUT, BATCH, EPOCHS = 122, 18, 14, 3  # the last batch of an epoch has 122 - 18 - 7 * 14 = 6 samples
MEAN, VARIANCE = "1.batch_norm.running_mean", "1.batch_norm.running_variance"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(7)
    images = (3 + 2 * random.standard_normal((SAMPLES, 6, 6, 2))).astype(np.float32)
    targets = (images.reshape(SAMPLES, -1) @ random.standard_normal((72, 3))).argmax(axis=1)
    path = tmp_path_factory.mktemp("data") / "data.npz"
    np.savez(path, x=images, y=targets)
    return path


def model(synchronized: bool) -> list:
    norm = {"batch_norm": {"synchronized": synchronized}}
    inside = [{"conv2d": {"filters": 4, "kernel": 3, "padding": "same"}}, norm, "tanh"]
    convolution = {"conv2d": {"filters": 4, "kernel": 3, "bias": False}}
    return [
        convolution, norm, "tanh", {"residual": {"layers": inside}},
        {"dense": {"units": 8}}, norm, "relu", {"dense": {"units": 3}},
    ]  # fmt: skip


def write_job(folder: Path, data: Path, synchronized: bool, sync: str = "all_reduce", **changes: object) -> Path:
    training = {"epochs": EPOCHS, "batch_size": BATCH, "seed": 3} | changes.pop("training", {})
    job = {
        "data": {"train": {"npz": {"path": str(data)}}, "validation_fraction": HELD_OUT / SAMPLES},
        "model": model(synchronized),
        "loss": "softmax_cross_entropy",
        "optimizer": {"momentum": {"learning_rate": 0.05}},
        "training": training,
        "sync": sync,
    }
    path = folder / f"{sync}-{synchronized}-{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps(job | changes))
    return path


def train(run_ranks, ranks: int, job: Path, output: Path, *more: object) -> dict[str, np.ndarray]:
    done = run_ranks(ranks, ["-m", "worker", "train", job, "-o", output, *more])
    assert done.returncode == 0, done.stdout + done.stderr
    return load_file(output / "model.safetensors")


def assert_close(result: dict[str, np.ndarray], reference: dict[str, np.ndarray], tolerance: float) -> None:
    """Within `tolerance` of each array's size."""
    assert result.keys() == reference.keys()
    for name, array in result.items():
        scale = max(1e-3, np.abs(reference[name]).max())
        np.testing.assert_allclose(array, reference[name], rtol=0, atol=tolerance * scale, err_msg=name)


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_synchronized_any_number_of_ranks_by_either_exchange_gives_what_one_gives(run_ranks, data, tmp_path) -> None:
    reference = train(run_ranks, 1, write_job(tmp_path, data, True), tmp_path / "1")
    assert (reference[MEAN] != 0).all()
    # Eight ranks share 6 samples at the end of an epoch: two of them have none.
    for sync, ranks in (("all_reduce", 2), ("all_reduce", 3), ("all_reduce", 8), ("parameter_server", 3)):
        output = tmp_path / f"{sync}-{ranks}"
        assert_close(train(run_ranks, ranks, write_job(tmp_path, data, True, sync), output), reference, 2e-4)
        loss = summary(tmp_path / "1")["validation_loss"]
        assert summary(output)["validation_loss"] == pytest.approx(loss, rel=1e-4)


def test_biases_that_the_mean_takes_off_again_stay_where_they_began_whatever_the_optimizer(
    run_ranks, data, tmp_path
) -> None:
    """Adam would make full steps of what rounding leaves of their gradient, other ones on each number of ranks."""
    convolution = {"conv2d": {"filters": 4, "kernel": 3}}
    norm = {"batch_norm": {"synchronized": True}}
    layers = [
        convolution,
        {"max_pool2d": {"size": 2}},
        norm,
        "tanh",
        {"dense": {"units": 8}},
        norm,
        {"dense": {"units": 3}},
    ]
    results = {}
    for ranks in (1, 2, 3):
        job = write_job(tmp_path, data, True, model=layers, optimizer={"adam": {"learning_rate": 0.003}})
        results[ranks] = train(run_ranks, ranks, job, tmp_path / str(ranks))
        assert not results[ranks]["0.conv2d.bias"].any()
        assert not results[ranks]["4.dense.bias"].any()
        assert results[ranks]["6.dense.bias"].all()
        assert_close(results[ranks], results[1], 2e-3)


def test_the_first_step_is_the_same_to_float32_rounding(run_ranks, data, tmp_path) -> None:
    """One step of the whole set: nothing has had time to grow."""
    training = {"epochs": 1, "batch_size": 0}
    for synchronized in (True, False):
        results = [
            train(
                run_ranks,
                ranks,
                write_job(tmp_path, data, synchronized, training=training),
                tmp_path / f"{synchronized}{ranks}",
            )
            for ranks in (1, 3)
        ]
        if synchronized:
            assert_close(results[1], results[0], 1e-5)
        else:  # the ranks' own statistics differ, but of the first layer's inputs the sums do not
            for name in (MEAN, VARIANCE):
                np.testing.assert_allclose(results[1][name], results[0][name], rtol=1e-5, err_msg=name)
            assert not np.allclose(results[1]["0.conv2d.weight"], results[0]["0.conv2d.weight"], rtol=1e-6)


@pytest.mark.parametrize("sync", ["all_reduce", "parameter_server"])
@pytest.mark.parametrize("synchronized", [True, False])
def test_resumed_equals_uninterrupted_bit_for_bit(run_ranks, data, tmp_path, sync, synchronized) -> None:
    job = write_job(tmp_path, data, synchronized, sync, training={"keep_best": True, "average": {"decay": 0.5}})
    whole = train(run_ranks, 2, job, tmp_path / "whole")
    train(run_ranks, 2, job, tmp_path / "parts", "--set", "training.epochs=1")
    resumed = train(run_ranks, 2, job, tmp_path / "parts", "--resume")
    assert all(np.array_equal(resumed[name], whole[name]) for name in whole)


def test_evaluate_and_initialize_from_use_the_saved_statistics_and_the_best_epoch_s(run_ranks, data, tmp_path) -> None:
    job = write_job(tmp_path, data, False, training={"keep_best": True, "epochs": 8, "micro_batch": 3})
    saved = train(run_ranks, 2, job, tmp_path / "out")
    of_last = load_file(sorted((tmp_path / "out" / "checkpoints").iterdir())[-1])
    if summary(tmp_path / "out")["best_epoch"] < 8:
        assert not np.array_equal(of_last["model_state"][:4], saved[MEAN])
    np.testing.assert_array_equal(of_last["best_model_state"][:4], saved[MEAN])
    done = run_ranks(1, ["-m", "worker", "evaluate", tmp_path / "out", job, "--format", "json"])
    assert done.returncode == 0, done.stderr
    loss = summary(tmp_path / "out")["validation_loss"]
    assert json.loads(done.stdout)["loss"] == pytest.approx(loss, rel=1e-5)

    still = {"optimizer": {"sgd": {"learning_rate": 1e-30}}, "training": {"epochs": 1, "batch_size": 0}}
    path = str(tmp_path / "out" / "model.safetensors")
    again = train(run_ranks, 2, write_job(tmp_path, data, False, initialize_from=path, **still), tmp_path / "again")
    np.testing.assert_array_equal(again["0.conv2d.weight"], saved["0.conv2d.weight"])
    assert MEAN in summary(tmp_path / "again")["initialized"]["fitted"]
    # One step has moved the statistics a tenth of the way to the whole set's, not from 0.
    assert np.abs(again[MEAN] - saved[MEAN]).max() < 0.3 * np.abs(saved[MEAN]).max()


def test_one_sample_a_worker_is_refused_before_anything_is_written(run_ranks, data, tmp_path) -> None:
    job = write_job(tmp_path, data, False, training={"batch_size": 2})
    done = run_ranks(2, ["-m", "worker", "train", job, "-o", tmp_path / "out"])
    assert done.returncode == 1
    assert "error: model[5].batch_norm: a worker computes 1 sample at a time" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_pieces_beside_synchronized_are_refused_by_path(run_ranks, data, tmp_path) -> None:
    job = write_job(tmp_path, data, True, training={"micro_batch": 4})
    done = run_ranks(1, ["-m", "worker", "train", job, "-o", tmp_path / "out"])
    assert done.returncode == 2
    assert "training.micro_batch: 4 is given beside model[1].batch_norm.synchronized" in done.stderr
