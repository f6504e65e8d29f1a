"""`paceline-worker train` with local steps: what is left when replicas meet now and then, are killed, or diverge."""

import json
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.mpi.jobs import LEARNING_RATE, assert_close, metrics, summary, train, write_data, write_job
from tests.mpi.mpirun import error_lines

ON_NODES = Path(__file__).with_name("programs") / "train_on_nodes.py"
NESTEROV = {"local": {"steps": 3, "outer": "nesterov"}}
# Everything that has to be the same on every replica when an epoch ends.
EVERYTHING = {
    "model": [{"dense": {"units": 32}}, "batch_norm", "relu", "dropout", {"dense": {"units": 4}}],
    "schedule": {"reduce_on_plateau": {"patience": 0, "factor": 0.5}, "warm_up_epochs": 0.5},
    "training": {"clip_norm": 0.3, "average": {"decay": 0.8}, "keep_best": True, "micro_batch": 7},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data.npz", noise=True)


def local_job(folder: Path, data: Path, sync: dict, optimizer: str = "adam", **parts) -> Path:
    path = write_job(folder, data, optimizer, **parts)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sync": sync}))
    return path


def train_on_nodes(run_ranks, ranks: int, ranks_per_node: int, job: Path, output: Path, *more: object):
    done = run_ranks(ranks, [ON_NODES, ranks_per_node, "train", job, "-o", output, *more])
    assert done.returncode == 0, done.stdout + done.stderr
    return load_file(output / "model.safetensors")


def assert_same(result: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> None:
    assert result.keys() == reference.keys()
    assert all(np.array_equal(result[name], reference[name]) for name in result)


@pytest.mark.parametrize(("ranks", "expected"), [(1, "one rank has nobody to meet"), (2, "nobody to meet; `replica: ")])
def test_averaging_on_one_node_is_plain_training_to_the_bit_and_says_so(run_ranks, data, tmp_path, ranks, expected):
    plain = train(run_ranks, ranks, write_job(tmp_path, data, **EVERYTHING), tmp_path / "plain")
    job = local_job(tmp_path, data, {"local": {"steps": 3}}, **EVERYTHING)
    done = run_ranks(ranks, ["-m", "worker", "train", job, "-o", tmp_path / "local"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(expected) == 1
    assert_same(load_file(tmp_path / "local" / "model.safetensors"), plain)
    for line, reference in zip(metrics(tmp_path / "local"), metrics(tmp_path / "plain"), strict=True):
        assert [line["validation_loss"], line["loss"]] == [reference["validation_loss"], reference["loss"]]
    assert summary(tmp_path / "local")["exchange"] == {"replicas": 1, "meetings": 0, "replica_sent_bytes": 0}


def test_nesterov_on_one_node_looks_ahead_of_itself(run_ranks, data, tmp_path) -> None:
    """Defined for one replica too, and the same however many ranks it has."""
    job = local_job(tmp_path, data, NESTEROV)
    results = [train(run_ranks, ranks, job, tmp_path / str(ranks)) for ranks in (1, 2)]
    assert_close(*results)
    assert summary(tmp_path / "2")["exchange"] == {"replicas": 1, "meetings": 18, "replica_sent_bytes": 0}


@pytest.mark.parametrize(("optimizer", "ranks", "ranks_per_node"), [("adam", 2, 1), ("adam", 3, 2), ("lamb", 4, 2)])
def test_resumed_equals_uninterrupted_bit_for_bit(run_ranks, data, tmp_path, optimizer, ranks, ranks_per_node) -> None:
    job = local_job(tmp_path, data, NESTEROV, optimizer, **EVERYTHING)
    whole = train_on_nodes(run_ranks, ranks, ranks_per_node, job, tmp_path / "whole")
    train_on_nodes(run_ranks, ranks, ranks_per_node, job, tmp_path / "parts", "--set", "training.epochs=4")
    assert_same(train_on_nodes(run_ranks, ranks, ranks_per_node, job, tmp_path / "parts", "--resume"), whole)
    lines = metrics(tmp_path / "whole")
    for line, expected in zip(metrics(tmp_path / "parts"), lines, strict=True):
        for name in ("step", "learning_rate", "loss", "validation_loss"):
            assert line.get(name) == expected.get(name)
    # Reports come at meetings alone: after steps 3 and, as the epoch ends, 5.
    assert [line["step"] for line in lines] == [5 * epoch + step for epoch in range(9) for step in (3, 5)]
    assert summary(tmp_path / "whole")["exchange"]["meetings"] == 18


def test_a_killed_run_goes_on_as_if_nothing_had_been(run_ranks, start_ranks, data, tmp_path) -> None:
    job = local_job(tmp_path, data, {"local": {"steps": 3, "outer": "nesterov", "replica": "rank"}}, **EVERYTHING)
    epochs = ("--set", "training.epochs=400")
    launcher = start_ranks(2, ["-m", "worker", "train", job, "-o", tmp_path / "parts", *epochs])
    deadline = time.monotonic() + 30
    while not list((tmp_path / "parts").glob("checkpoints/step-*5.safetensors")):
        assert time.monotonic() < deadline, "no checkpoint in 30 s"
        time.sleep(0.01)
    launcher.send_signal(signal.SIGKILL)
    launcher.communicate(timeout=20)
    resumed = train(run_ranks, 2, job, tmp_path / "parts", "--resume", *epochs)
    assert_same(resumed, train(run_ranks, 2, job, tmp_path / "whole", *epochs))


def test_a_run_goes_on_with_another_number_of_replicas_and_by_another_exchange(run_ranks, data, tmp_path) -> None:
    """As DiLoCo's authors do: weights trained by the all-reduce first, then local steps."""
    output = tmp_path / "out"
    train(run_ranks, 2, write_job(tmp_path, data), output, "--set", "training.epochs=2")
    replicas = {"local": NESTEROV["local"] | {"replica": "rank"}}
    job = local_job(tmp_path, data, replicas)
    for ranks, epochs in ((2, 4), (3, 6)):
        train(run_ranks, ranks, job, output, "--resume", "--set", f"training.epochs={epochs}")
        assert summary(output)["exchange"]["replicas"] == ranks
    for epochs, sync in ((8, "all_reduce"), (9, "parameter_server")):
        job = write_job(tmp_path, data, sync=sync)
        train(run_ranks, 2, job, output, "--resume", "--set", f"training.epochs={epochs}")
    losses = [line["loss"] for line in metrics(output)]
    assert len(losses) == 9
    assert max(losses[2:]) < losses[0]
    assert losses[-1] < losses[1]


@pytest.mark.parametrize("outer", ["average", "nesterov"])
def test_digits_are_learned_as_well_as_by_the_all_reduce(run_ranks, tmp_path, outer) -> None:
    job = {
        "data": {"train": {"built_in": "digits"}, "validation_fraction": 0.2, "scale": 0.0625},
        "model": [{"dense": {"units": 64}}, "relu", {"dense": {"units": 10}}],
        "loss": "softmax_cross_entropy",
        "optimizer": {"adam": {"learning_rate": 0.003}},
        "training": {"epochs": 12, "batch_size": 32, "seed": 1},
    }
    accuracy = {}
    for name, sync in (("plain", "all_reduce"), ("local", {"local": {"steps": 15, "outer": outer}})):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(job | {"sync": sync}))
        train_on_nodes(run_ranks, 3, 2, path, tmp_path / name)
        accuracy[name] = summary(tmp_path / name)["validation_accuracy"]
    assert accuracy["local"] > accuracy["plain"] - 0.015
    assert accuracy["plain"] > 0.95


def test_a_loss_that_is_not_finite_between_meetings_ends_the_job_and_names_the_step(run_ranks, data, tmp_path) -> None:
    job = local_job(tmp_path, data, {"local": {"steps": 100, "replica": "rank"}}, "sgd")
    job.write_text(job.read_text().replace(str(LEARNING_RATE), "1e38"))
    done = run_ranks(2, ["-m", "worker", "train", job, "-o", tmp_path / "out"])
    assert done.returncode == 1
    errors = error_lines(done.stderr)
    assert errors, done.stderr
    assert all("step 2: the loss of this rank is nan before the next meeting" in line for line in errors), errors
    assert not list((tmp_path / "out").glob("checkpoints/*"))


@pytest.mark.parametrize("rate", ["1e16", "1e38"])
def test_a_divergence_seen_at_a_meeting_is_everybodys(run_ranks, data, tmp_path, rate) -> None:
    job = local_job(tmp_path, data, {"local": {"steps": 1, "replica": "rank"}}, "sgd")
    job.write_text(job.read_text().replace(str(LEARNING_RATE), rate))
    done = run_ranks(2, ["-m", "worker", "train", job, "-o", tmp_path / "out"])
    assert done.returncode == 1
    errors = error_lines(done.stderr)
    assert len(errors) == 1, done.stderr
    assert "step 2 (epoch 1): the loss is" in errors[0]


@pytest.mark.parametrize("steps", [2, 5, 100])
def test_a_loss_is_held_against_the_first_steps_also_where_that_is_not_reported(run_ranks, data, tmp_path, steps):
    """Finite and enormous, and what is first counted is a mean over steps that have diverged already."""
    job = local_job(tmp_path, data, {"local": {"steps": steps, "replica": "rank"}}, "sgd")
    job.write_text(job.read_text().replace(str(LEARNING_RATE), "1e8"))
    done = run_ranks(2, ["-m", "worker", "train", job, "-o", tmp_path / "out"])
    assert done.returncode == 1, done.stdout
    errors = error_lines(done.stderr)
    assert errors, done.stderr
    assert all(re.search(r"step 2.*: the loss .*is [\d.]+e\+\d+", line) for line in errors), errors
    assert not list((tmp_path / "out").glob("checkpoints/*"))


def test_more_steps_than_an_epoch_has_are_remarked_on(run_ranks, data, tmp_path) -> None:
    job = local_job(tmp_path, data, {"local": {"steps": 6, "replica": "rank"}}, training={"epochs": 2})
    done = run_ranks(2, ["-m", "worker", "train", job, "-o", tmp_path / "out"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sync.local.steps: 6 is more than the 5 of an epoch") == 1
    assert summary(tmp_path / "out")["exchange"]["meetings"] == 2
    fewer = run_ranks(2, ["-m", "worker", "train", job, "-o", tmp_path / "two", "--set", "sync.local.steps=5"])
    assert "sync.local.steps" not in fewer.stdout


def test_a_batch_with_fewer_samples_than_ranks_is_refused_before_anything_is_written(run_ranks, data, tmp_path) -> None:
    job = local_job(tmp_path, data, {"local": {"replica": "rank"}}, training={"batch_size": 2})
    done = run_ranks(3, ["-m", "worker", "train", job, "-o", tmp_path / "out"])
    assert done.returncode == 2
    assert done.stderr.count("sync.local: a batch of 2 leaves some of the 3 ranks without a sample") == 1
    assert not (tmp_path / "out").exists()
