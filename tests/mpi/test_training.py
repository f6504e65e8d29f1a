"""`paceline-worker train` under mpirun: the same result on any number of ranks, by either exchange, resumed or not."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.mpi.jobs import LEARNING_RATE, assert_close, metrics, summary, train, write_data, write_job
from tests.mpi.mpirun import error_lines
from worker.data.sharding import sample_order

RANKS = (2, 3, 5)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data.npz")


def test_any_number_of_ranks_gives_the_same_weights_and_the_same_validation(run_ranks, data, tmp_path) -> None:
    job = write_job(tmp_path, data)
    reference = train(run_ranks, 1, job, tmp_path / "1")
    summary = json.loads((tmp_path / "1" / "summary.json").read_text())
    assert summary["steps"] >= 45
    for ranks in RANKS:
        assert_close(train(run_ranks, ranks, job, tmp_path / str(ranks)), reference)
        for line, expected in zip(metrics(tmp_path / str(ranks)), metrics(tmp_path / "1"), strict=True):
            assert line["validation_loss"] == pytest.approx(expected["validation_loss"], rel=1e-5)
            assert line["validation_accuracy"] == expected["validation_accuracy"]
            assert line["samples"] == expected["samples"]


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw", "lamb"])
def test_parameter_server_and_all_reduce_give_the_same_weights(run_ranks, data, tmp_path, optimizer) -> None:
    reference = train(run_ranks, 1, write_job(tmp_path, data, optimizer), tmp_path / "all-reduce-1")
    job = write_job(tmp_path, data, optimizer, sync="parameter_server")
    for ranks in (1, 2, 3):
        assert_close(train(run_ranks, ranks, job, tmp_path / f"server-{ranks}"), reference)
    all_reduce = write_job(tmp_path, data, optimizer)
    for ranks in (2, 3):
        assert_close(train(run_ranks, ranks, all_reduce, tmp_path / f"all-reduce-{ranks}"), reference)


@pytest.mark.parametrize("mode", ["synchronous", {"bounded_staleness": {"steps": 2}}, "asynchronous"])
def test_a_job_learns_in_every_mode_of_the_parameter_server(run_ranks, data, tmp_path, mode) -> None:
    job = write_job(tmp_path, data, sync="parameter_server")
    described = json.loads(job.read_text()) | {"sync": {"parameter_server": {"mode": mode}}}
    job.write_text(json.dumps(described))
    train(run_ranks, 2, job, tmp_path / "out")
    lines = metrics(tmp_path / "out")
    assert lines[-1]["validation_loss"] < 0.75 * lines[0]["validation_loss"]
    assert lines[-1]["samples"] == lines[-1]["epoch"] * lines[0]["samples"]


@pytest.mark.parametrize("sync", ["all_reduce", "parameter_server"])
def test_resumed_equals_uninterrupted_bit_for_bit(run_ranks, data, tmp_path, sync) -> None:
    job = write_job(tmp_path, data, sync=sync)
    whole = train(run_ranks, 2, job, tmp_path / "whole")
    train(run_ranks, 2, job, tmp_path / "parts", "--set", "training.epochs=4")
    resumed = train(run_ranks, 2, job, tmp_path / "parts", "--resume")
    assert all(np.array_equal(resumed[name], whole[name]) for name in whole)
    steps = [line["step"] for line in metrics(tmp_path / "parts")]
    assert steps == sorted(set(steps))
    assert steps[-1] == metrics(tmp_path / "whole")[-1]["step"]


def test_a_run_is_resumed_on_another_number_of_ranks_and_by_the_other_exchange(run_ranks, data, tmp_path) -> None:
    whole = train(run_ranks, 1, write_job(tmp_path, data), tmp_path / "whole")
    train(run_ranks, 2, write_job(tmp_path, data), tmp_path / "parts", "--set", "training.epochs=4")
    job = write_job(tmp_path, data, sync="parameter_server")
    assert_close(train(run_ranks, 3, job, tmp_path / "parts", "--resume"), whole)


@pytest.mark.parametrize("batch_size", [0, 1])
def test_whole_batch_and_single_sample_descent_work_on_three_ranks(run_ranks, data, tmp_path, batch_size) -> None:
    job = write_job(tmp_path, data, "sgd", training={"batch_size": batch_size, "epochs": 1})
    reference = train(run_ranks, 1, job, tmp_path / "1")
    assert_close(train(run_ranks, 3, job, tmp_path / "3"), reference)


def test_an_output_folder_that_holds_a_run_is_left_alone(run_ranks, data, tmp_path) -> None:
    job = write_job(tmp_path, data, training={"epochs": 1})
    train(run_ranks, 1, job, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    done = run_ranks(2, ["-m", "worker", "train", job, "-o", tmp_path / "out"])
    assert done.returncode == 2
    assert done.stderr.count("already holds a run") == 1
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


def test_a_diverging_loss_stops_all_ranks_names_the_step_and_keeps_the_last_good_checkpoint(
    run_ranks, data, tmp_path
) -> None:
    job = write_job(tmp_path, data, "sgd", training={"epochs": 2})
    train(run_ranks, 2, job, tmp_path / "out")
    good = sorted((tmp_path / "out" / "checkpoints").iterdir())
    wild = ["--resume", "--set", "training.epochs=9"]
    text = job.read_text().replace(str(LEARNING_RATE), "1e38")
    job.write_text(text)
    (tmp_path / "out" / "job.yaml").write_text(text)  # the same job, so that the wild rate meets a checkpoint
    done = run_ranks(2, ["-m", "worker", "train", job, "-o", tmp_path / "out", *wild])
    assert done.returncode == 1
    errors = error_lines(done.stderr)
    assert len(errors) == 1, done.stderr
    assert "the loss is" in errors[0]
    assert "step 1" in errors[0]
    assert "last good checkpoint" in errors[0]
    assert sorted((tmp_path / "out" / "checkpoints").iterdir()) == good


def test_resuming_a_run_that_is_done_changes_nothing_and_says_so(run_ranks, data, tmp_path) -> None:
    job = write_job(tmp_path, data, training={"epochs": 2})
    train(run_ranks, 2, job, tmp_path / "out")
    before = {name: (tmp_path / "out" / name).read_bytes() for name in ("model.safetensors", "summary.json")}
    again = run_ranks(2, ["-m", "worker", "train", job, "-o", tmp_path / "out", "--resume"])
    assert again.returncode == 0, again.stderr
    assert "nothing was left to do" in again.stdout
    fewer = [job, "-o", tmp_path / "out", "--resume", "--set", "training.epochs=1"]
    refused = run_ranks(2, ["-m", "worker", "train", *fewer])
    assert refused.returncode == 2
    assert "has done 2 epochs and training.epochs is 1" in refused.stderr
    assert before == {name: (tmp_path / "out" / name).read_bytes() for name in before}
    assert "epochs: 2" in (tmp_path / "out" / "job.yaml").read_text()


def test_an_infinite_validation_loss_stops_the_run_and_keeps_the_checkpoint_before(run_ranks, data, tmp_path) -> None:
    arrays = np.load(data)
    np.savez(tmp_path / "huge.npz", x=arrays["x"] * np.float32(1e30), y=arrays["x"][:, :2])
    np.savez(tmp_path / "train.npz", x=arrays["x"], y=arrays["x"][:, :2])
    job = {
        "data": {"train": {"npz": {"path": "train.npz"}}, "validation": {"npz": {"path": "huge.npz"}}},
        "model": [{"dense": {"units": 2}}],
        "loss": "mean_squared_error",
        "optimizer": "sgd",
        "training": {"epochs": 3},
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    done = run_ranks(2, ["-m", "worker", "train", tmp_path / "job.json", "-o", tmp_path / "out"])
    assert done.returncode == 1
    assert "(end of epoch 1): the validation loss is inf" in done.stderr
    assert not (tmp_path / "out" / "summary.json").exists()
    assert "Infinity" not in (tmp_path / "out" / "metrics.jsonl").read_text()


MODES = ["asynchronous", {"bounded_staleness": {"steps": 2}}]


@pytest.mark.parametrize("mode", MODES)
def test_a_rank_that_diverges_at_a_step_of_its_own_says_so_itself(run_ranks, data, tmp_path, mode) -> None:
    """The others are at other steps, so that it cannot be left to rank 0."""
    job = write_job(tmp_path, data, "sgd", {"parameter_server": {"mode": mode}})
    wild = "optimizer.sgd.learning_rate=1e8"
    done = run_ranks(2, ["-m", "worker", "train", job, "-o", tmp_path / "out", "--set", wild])
    assert done.returncode == 1
    said = r"error: rank [01] of 2 on \S+: step \d+ \(epoch 1\): the loss is "
    assert any(re.match(said, line) for line in error_lines(done.stderr)), done.stderr
    assert "no progress" not in done.stderr


@pytest.mark.parametrize("mode", MODES)
def test_a_rank_whose_gradient_a_server_refuses_says_so_itself(run_ranks, tmp_path, mode) -> None:
    samples = 40
    features = np.random.default_rng(1).standard_normal((samples, 4)).astype(np.float32)
    features[sample_order(3, 0, samples)[-1]] = 1e30  # in the last rank's share
    np.savez(tmp_path / "huge.npz", x=features, y=np.zeros((samples, 2)))
    job = write_job(
        *(tmp_path, tmp_path / "huge.npz", "sgd", {"parameter_server": {"mode": mode}}),
        training={"batch_size": 0},
        model=[{"dense": {"units": 2}}],
        loss="mean_squared_error",
    )
    job.write_text(json.dumps(json.loads(job.read_text()) | {"data": {"train": {"npz": {"path": "huge.npz"}}}}))
    done = run_ranks(2, ["-m", "worker", "train", job, "-o", tmp_path / "out"])
    assert done.returncode == 1
    # Rank 1, or rank 0 of it where the server's word to the other worker is faster.
    said = r"error: rank [01] of 2 on \S+: parameter server \S+, step \d+: worker 1 of 2"
    assert any(re.match(said, line) for line in error_lines(done.stderr)), done.stderr
    assert "no progress" not in done.stderr


def test_weights_that_are_finite_and_enormous_end_the_run_where_no_later_loss_shows_them(run_ranks, data, tmp_path):
    job = write_job(tmp_path, data, training={"epochs": 1, "batch_size": 0})
    job.write_text(json.dumps(json.loads(job.read_text()) | {"data": {"train": {"npz": {"path": str(data)}}}}))
    wild = ("--set", "optimizer.adam.learning_rate=1e30")
    done = run_ranks(2, ["-m", "worker", "train", job, "-o", tmp_path / "out", *wild])
    assert done.returncode == 1
    assert re.search(r"step 1 \(epoch 1\): a weight has become 1e\+30, whose square float32 cannot hold", done.stderr)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_run_that_failed_before_its_first_checkpoint_is_started_anew_in_its_folder(run_ranks, data, tmp_path) -> None:
    job = write_job(tmp_path, data, "sgd", training={"epochs": 1})
    wild = [job, "-o", tmp_path / "out", "--set", "optimizer.sgd.learning_rate=1e38"]
    diverged = run_ranks(1, ["-m", "worker", "train", *wild])
    assert diverged.returncode == 1
    assert "step 2 (epoch 1): the loss is" in diverged.stderr
    assert "Warning" not in diverged.stderr, "what overflows is said once"
    resumed = run_ranks(1, ["-m", "worker", "train", job, "-o", tmp_path / "out", "--resume"])
    assert resumed.returncode == 2
    assert "leave --resume out to start anew" in resumed.stderr
    train(run_ranks, 1, job, tmp_path / "out")
    assert metrics(tmp_path / "out")[0]["epoch"] == 1


def test_metrics_are_the_same_on_any_number_of_ranks_and_in_evaluate(run_ranks, data, tmp_path) -> None:
    job = write_job(tmp_path, data, training={"epochs": 2})
    job.write_text(json.dumps(json.loads(job.read_text()) | {"metrics": ["f1", "confusion_matrix"]}))
    train(run_ranks, 1, job, tmp_path / "1")
    train(run_ranks, 3, job, tmp_path / "3")
    expected = json.loads((tmp_path / "1" / "summary.json").read_text())["validation_metrics"]
    assert sum(map(sum, expected["confusion_matrix"])) == 41
    for line in (metrics(tmp_path / "3")[-1], json.loads((tmp_path / "3" / "summary.json").read_text())):
        assert line["validation_metrics"] == expected
    said = run_ranks(1, ["-m", "worker", "evaluate", tmp_path / "3", job, "--format", "json"])
    assert json.loads(said.stdout)["metrics"] == expected


def test_sequences_of_numbers_train_resume_evaluate_predict_and_export(run_ranks, tmp_path) -> None:
    """Stored as (n, time, features): no channel is made up for them."""
    random = np.random.default_rng(5)
    steps = random.standard_normal((200, 10, 8)).astype(np.float32)
    np.savez(tmp_path / "steps.npz", x=steps, y=(steps[:, :, 0].sum(axis=1) > 0).astype(np.int64))
    job = write_job(
        *(tmp_path, tmp_path / "steps.npz"),
        training={"epochs": 4},
        model=["positions", "layer_norm", {"attention": {"heads": 2}}, "relu", {"dense": {"units": 2}}],
    )
    output = tmp_path / "out"
    whole = train(run_ranks, 1, job, tmp_path / "whole")
    train(run_ranks, 2, job, output, "--set", "training.epochs=2")
    assert_close(train(run_ranks, 2, job, output, "--resume"), whole)
    evaluated = run_ranks(1, ["-m", "worker", "evaluate", output, job, "--format", "json"])
    assert json.loads(evaluated.stdout)["loss"] == pytest.approx(summary(output)["validation_loss"], rel=1e-5)
    np.save(tmp_path / "x.npy", steps[:3])
    said = run_ranks(1, ["-m", "worker", "predict", output, tmp_path / "x.npy", "--format", "jsonl"])
    assert said.stdout.count("\n") == 3, said.stderr
    flipped = {"train": {"npz": {"path": "steps.npz"}}, "augment": {"flip": "vertical"}}
    job.write_text(json.dumps(json.loads(job.read_text()) | {"data": flipped}))
    assert train(run_ranks, 2, job, tmp_path / "flipped", "--set", "training.epochs=1").keys() == whole.keys()
    onnx = pytest.importorskip("onnx")
    exported = run_ranks(1, ["-m", "worker", "export", output, "--onnx", tmp_path / "model.onnx"])
    assert exported.returncode == 0, exported.stderr
    shape = onnx.load(tmp_path / "model.onnx").graph.input[0].type.tensor_type.shape
    assert [size.dim_value for size in shape.dim[1:]] == [10, 8]
