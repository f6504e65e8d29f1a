"""`training.reproducible`: the same digests of weights and optimizer state on any number of ranks and nodes."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.mpi.jobs import train

PROGRAM = Path(__file__).parent / "programs" / "reproducible.py"
SAMPLES = 53  # batches of 20, 20 and a ragged one of 2 where a fifth is held out: fewer samples than virtual shards
DENSE = [{"dense": {"units": 13}}, "tanh", {"dense": {"units": 4}}]
CNN = [
    {"conv2d": {"filters": 32, "kernel": 3, "padding": "same"}},
    "relu",
    {"conv2d": {"filters": 32, "kernel": 3, "padding": "same"}},  # by Winograd's method
    "batch_norm",
    "relu",
    {"max_pool2d": {"size": 2}},
    {"dropout": {"rate": 0.3}},
    {"dense": {"units": 4}},
]
ATTENTION = [
    {"embedding": {"vocabulary": 11, "units": 8}},
    {"residual": {"layers": ["layer_norm", {"attention": {"heads": 2}}]}},
    "flatten",
    {"dense": {"units": 4}},
]

# Of each case: what is laid over the job, and the kind of its samples.
CASES: dict[str, tuple[dict, str]] = {
    "adam": ({}, "numbers"),
    "cnn": ({"model": CNN, "optimizer": {"momentum": {"learning_rate": 0.05}}}, "images"),
    "attention": ({"model": ATTENTION}, "tokens"),
    "clip_norm": ({"training": {"clip_norm": 0.05, "virtual_shards": 5, "batch_size": 21}}, "numbers"),
    "lamb": ({"optimizer": {"lamb": {"learning_rate": 0.02}}, "training": {"average": {"decay": 0.9}}}, "numbers"),
    "micro_batch": ({"training": {"micro_batch": 2, "virtual_shards": 3}}, "numbers"),
    "small_batch": ({"training": {"batch_size": 5}}, "numbers"),
    "plateau": ({"schedule": {"reduce_on_plateau": {"patience": 1}}, "training": {"keep_best": True}}, "numbers"),
    # More than one of the blocks in which squares are added up, and than one chunk.
    "wide": (
        {"model": [{"dense": {"units": 3500}}, "relu", {"dense": {"units": 4}}], "training": {"clip_norm": 0.5},
         "optimizer": {"lamb": {"learning_rate": 0.01}}},
        "numbers",
    ),
}  # fmt: skip
# What a server does with other arithmetic of its own: the sums of totals, of squares and of tensors.
BY_SERVER = ("cnn", "clip_norm", "wide", "plateau")


def write_samples(folder: Path) -> None:
    random = np.random.default_rng(5)
    targets = random.integers(0, 4, SAMPLES)
    np.savez(folder / "numbers.npz", x=random.standard_normal((SAMPLES, 20)).astype(np.float32), y=targets)
    np.savez(folder / "images.npz", x=random.integers(0, 256, (SAMPLES, 8, 8, 1)).astype(np.uint8), y=targets)
    np.savez(folder / "tokens.npz", x=random.integers(0, 11, (SAMPLES, 6)), y=targets)


def write_case(folder: Path, data: Path, name: str, sync: str = "all_reduce") -> Path:
    parts, samples = CASES[name]
    source = {"train": {"npz": {"path": str(data / f"{samples}.npz")}}, "validation_fraction": 0.2}
    if samples == "images":
        source |= {"scale": 1 / 255, "augment": {"flip": "horizontal", "shift": 1}}
    training = {"epochs": 2, "batch_size": 20, "seed": 3, "reproducible": True} | parts.get("training", {})
    job = {"model": DENSE, "loss": "softmax_cross_entropy", "optimizer": {"adam": {"learning_rate": 0.03}}}
    path = folder / f"{name}-{sync}.json"
    path.write_text(json.dumps(job | parts | {"data": source, "training": training, "sync": sync}))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_samples(folder)
    return folder


def digests(run_ranks, ranks: int, jobs: Path, outputs: Path, ranks_per_node: int = 0, act: str = "whole"):
    """By case, whatever the exchange: the set of digests."""
    done = run_ranks(ranks, [PROGRAM, jobs, outputs, ranks_per_node, act], timeout_seconds=240)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, set[str]] = {}
    for name, digest in (line.split() for line in done.stdout.splitlines()):
        found.setdefault(name.partition("-")[0], set()).add(digest)
    return found


def test_the_same_bits_on_any_number_of_ranks_nodes_and_workers_of_a_server(run_ranks, data, tmp_path) -> None:
    by_all_reduce, both = tmp_path / "all_reduce", tmp_path / "both"
    for folder in (by_all_reduce, both):
        folder.mkdir()
    for name in CASES:
        write_case(by_all_reduce, data, name)
        write_case(both, data, name)
    for name in BY_SERVER:
        write_case(both, data, name, "parameter_server")
    expected = digests(run_ranks, 1, both, tmp_path / "1")
    assert expected.keys() == CASES.keys()
    assert all(len(found) == 1 for found in expected.values()), expected
    for ranks, ranks_per_node, jobs in (
        (2, 0, both),
        (3, 0, both),
        (4, 0, by_all_reduce),
        (7, 0, by_all_reduce),
        (4, 2, by_all_reduce),
        (4, 3, by_all_reduce),  # nodes of 3 ranks and of 1
        (3, 1, by_all_reduce),
    ):
        where = tmp_path / f"{ranks}of{ranks_per_node}"
        assert digests(run_ranks, ranks, jobs, where, ranks_per_node) == expected, where


@pytest.mark.parametrize("sync", ["all_reduce", "parameter_server"])
def test_the_same_bits_after_a_kill_and_a_resume_on_other_ranks(run_ranks, data, tmp_path, sync) -> None:
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    write_case(jobs, data, "cnn", sync)
    expected = digests(run_ranks, 1, jobs, tmp_path / "whole")
    killed = run_ranks(3, [PROGRAM, jobs, tmp_path / "killed", 0, "kill"])
    assert killed.returncode != 0
    assert not (tmp_path / "killed" / f"cnn-{sync}" / "model.safetensors").exists()
    assert digests(run_ranks, 2, jobs, tmp_path / "killed", act="resume") == expected


def test_ranks_without_shards_are_told_of_and_change_nothing(run_ranks, data, tmp_path) -> None:
    job = write_case(tmp_path, data, "micro_batch")
    alone = train(run_ranks, 1, job, tmp_path / "1")
    done = run_ranks(4, ["-m", "worker", "train", job, "-o", tmp_path / "4"])
    assert "1 of 4 workers have nothing to compute: training.virtual_shards is 3" in done.stdout
    again = train(run_ranks, 5, job, tmp_path / "5")
    assert all(np.array_equal(alone[name], again[name]) for name in alone)


def test_what_reproducible_rules_out_is_refused_by_path(run_ranks, data, tmp_path) -> None:
    job = write_case(tmp_path, data, "cnn")
    spec = json.loads(job.read_text())
    spec["model"][1] = {"batch_norm": {"synchronized": True}}
    job.write_text(json.dumps(spec))
    done = run_ranks(1, ["-m", "worker", "train", job, "-o", tmp_path / "out"])
    assert done.returncode == 2
    assert "model[1].batch_norm.synchronized: adds up statistics in the middle of a step" in done.stderr


def test_one_sample_a_virtual_shard_cannot_train_batch_norm(run_ranks, data, tmp_path) -> None:
    job = write_case(tmp_path, data, "adam")
    spec = json.loads(job.read_text())
    spec["model"][1] = "batch_norm"
    job.write_text(json.dumps(spec | {"training": spec["training"] | {"batch_size": 8}}))
    done = run_ranks(1, ["-m", "worker", "train", job, "-o", tmp_path / "out"])
    assert done.returncode == 1
    assert "training.virtual_shards: 8 cut a batch of 8 into pieces of 1; lower it, for model[1]" in done.stderr


def test_without_it_the_bits_differ(run_ranks, data, tmp_path) -> None:
    """What the other tests hold is not so by itself."""
    job = write_case(tmp_path, data, "adam")
    by_ranks = [
        train(run_ranks, ranks, job, tmp_path / str(ranks), "--set", "training.reproducible=false") for ranks in (1, 3)
    ]
    assert any(not np.array_equal(by_ranks[0][name], by_ranks[1][name]) for name in by_ranks[0])
