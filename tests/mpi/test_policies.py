"""Schedules, clipping, averages, stopping and the best weights under mpirun.

The same on any number of ranks and by either exchange, and after a resume to the last bit.
"""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.mpi.jobs import EPOCHS, assert_close, metrics, summary, train, write_data, write_job

# A rate that drops on each plateau, a gradient that is clipped at most steps, and an average that lags behind.
POLICIES = {
    "schedule": {"reduce_on_plateau": {"patience": 0, "factor": 0.5}, "warm_up_epochs": 0.5},
    "training": {"clip_norm": 0.3, "average": {"decay": 0.8}, "keep_best": True, "micro_batch": 7},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data.npz", noise=True)


def test_all_policies_together_give_the_same_on_any_ranks_and_by_either_exchange(run_ranks, data, tmp_path) -> None:
    reference = train(run_ranks, 1, write_job(tmp_path, data, **POLICIES), tmp_path / "1")
    rates = [line["learning_rate"] for line in metrics(tmp_path / "1")]
    assert len(set(rates)) > 2, "the rate fell more than once"
    for sync, ranks in (("all_reduce", 2), ("all_reduce", 3), ("parameter_server", 1), ("parameter_server", 2)):
        output = tmp_path / f"{sync}-{ranks}"
        assert_close(train(run_ranks, ranks, write_job(tmp_path, data, sync=sync, **POLICIES), output), reference)
        assert [line["learning_rate"] for line in metrics(output)] == rates
        assert summary(output)["best_epoch"] == summary(tmp_path / "1")["best_epoch"]


@pytest.mark.parametrize("sync", ["all_reduce", "parameter_server"])
@pytest.mark.parametrize("epochs_before", [2, 6])
def test_resumed_equals_uninterrupted_bit_for_bit(run_ranks, data, tmp_path, sync, epochs_before) -> None:
    job = write_job(tmp_path, data, sync=sync, **POLICIES)
    whole = train(run_ranks, 2, job, tmp_path / "whole")
    train(run_ranks, 2, job, tmp_path / "parts", "--set", f"training.epochs={epochs_before}")
    resumed = train(run_ranks, 2, job, tmp_path / "parts", "--resume")
    assert all(np.array_equal(resumed[name], whole[name]) for name in whole)
    for line, expected in zip(metrics(tmp_path / "parts"), metrics(tmp_path / "whole"), strict=True):
        for name in ("step", "learning_rate", "loss", "validation_loss"):
            assert line[name] == expected[name]
    for name in ("best_epoch", "validation_loss", "validation_accuracy"):
        assert summary(tmp_path / "parts")[name] == summary(tmp_path / "whole")[name]


def test_lamb_with_averages_and_clipped_values_gives_the_same_everywhere_and_resumed(run_ranks, data, tmp_path) -> None:
    """Its norms are those of whole tensors: three ranks cut the first weight of 640 elements in the middle."""
    training = {"average": {"decay": 0.8}, "clip_value": 0.005, "epochs": 5}
    reference = train(run_ranks, 1, write_job(tmp_path, data, "lamb", training=training), tmp_path / "1")
    for sync, ranks in (("all_reduce", 2), ("all_reduce", 3), ("parameter_server", 1), ("parameter_server", 2)):
        job = write_job(tmp_path, data, "lamb", sync, training)
        whole = train(run_ranks, ranks, job, tmp_path / f"{sync}-{ranks}")
        assert_close(whole, reference)
    for sync in ("all_reduce", "parameter_server"):
        job = write_job(tmp_path, data, "lamb", sync, training)
        train(run_ranks, 2, job, tmp_path / sync, "--set", "training.epochs=2")
        resumed = train(run_ranks, 2, job, tmp_path / sync, "--resume")
        whole = load_file(tmp_path / f"{sync}-2" / "model.safetensors")
        assert all(np.array_equal(resumed[name], whole[name]) for name in whole)


def test_micro_batches_add_up_to_the_batch(run_ranks, data, tmp_path) -> None:
    model = [{"dense": {"units": 32}}, "relu", "dropout", {"dense": {"units": 4}}]
    reference = train(run_ranks, 1, write_job(tmp_path, data, model=model), tmp_path / "whole")
    for ranks, micro_batch in ((1, 1), (1, 16), (2, 3)):
        job = write_job(tmp_path, data, model=model, training={"micro_batch": micro_batch})
        assert_close(train(run_ranks, ranks, job, tmp_path / f"{ranks}-{micro_batch}"), reference)


def test_clipping_shortens_the_step(run_ranks, data, tmp_path) -> None:
    results = [
        train(run_ranks, 1, write_job(tmp_path, data, training={"epochs": 1} | clipping), tmp_path / str(index))
        for index, clipping in enumerate(({}, {"clip_norm": 1e6}, {"clip_value": 1e-4}))
    ]
    assert_close(results[1], results[0])
    assert not np.allclose(results[2]["0.dense.weight"], results[0]["0.dense.weight"], atol=1e-3)


def test_the_best_epoch_s_weights_are_kept_and_are_what_the_summary_speaks_of(run_ranks, data, tmp_path) -> None:
    job = write_job(tmp_path, data, training={"keep_best": True})
    train(run_ranks, 2, job, tmp_path / "out")
    losses = [line["validation_loss"] for line in metrics(tmp_path / "out") if "validation_loss" in line]
    assert losses.index(min(losses)) < EPOCHS - 1, "the last epoch is the best: the test shows nothing"
    assert summary(tmp_path / "out")["best_epoch"] == losses.index(min(losses)) + 1
    assert summary(tmp_path / "out")["validation_loss"] == min(losses)
    done = run_ranks(1, ["-m", "worker", "evaluate", tmp_path / "out", job])
    assert f"loss {min(losses):.4g}"[:8] in done.stdout, done.stdout + done.stderr


def test_the_averaged_weights_are_evaluated_and_saved(run_ranks, data, tmp_path) -> None:
    job = write_job(tmp_path, data, training={"average": {"decay": 0.9}})
    saved = train(run_ranks, 2, job, tmp_path / "averaged")
    plain = train(run_ranks, 2, write_job(tmp_path, data), tmp_path / "plain")
    assert not np.allclose(saved["0.dense.weight"], plain["0.dense.weight"], atol=1e-3)
    pairs = list(zip(metrics(tmp_path / "averaged"), metrics(tmp_path / "plain"), strict=True))
    assert all(one["loss"] == pytest.approx(other["loss"], rel=1e-5) for one, other in pairs), "training is the same"
    assert pairs[-1][0]["validation_loss"] != pytest.approx(pairs[-1][1]["validation_loss"], rel=1e-3)
    done = run_ranks(1, ["-m", "worker", "evaluate", tmp_path / "averaged", job])
    assert f"loss {summary(tmp_path / 'averaged')['validation_loss']:.4g}"[:8] in done.stdout, done.stdout


def test_training_stops_early_says_why_and_stays_stopped_when_resumed(run_ranks, data, tmp_path) -> None:
    job = write_job(tmp_path, data, training={"epochs": 60, "early_stopping": {"patience": 2}})
    done = run_ranks(2, ["-m", "worker", "train", job, "-o", tmp_path / "out"])
    assert done.returncode == 0, done.stderr
    assert "did not improve by more than 0 for 2 epochs" in done.stdout
    before = summary(tmp_path / "out")
    assert before["stopped_early"] is True
    assert before["epochs"] < 60
    weights = train(run_ranks, 1, job, tmp_path / "out", "--resume")
    assert summary(tmp_path / "out")["steps"] == before["steps"]
    assert all(np.isfinite(array).all() for array in weights.values())
