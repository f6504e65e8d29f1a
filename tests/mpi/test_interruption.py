"""A run that is told to stop, or killed, in the midst of an epoch goes on as if nothing had been.

Each job is stopped behind a step drawn for it, resumed on as many ranks and, where the result does not depend on their
number, on another number too.
"""

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.mpi.jobs import SAMPLES, assert_close, metrics, summary, write_data, write_job
from tests.mpi.mpirun import error_lines
from tests.mpi.test_faults import rank_process

STOPPED = Path(__file__).with_name("programs") / "stopped.py"
EPOCHS, STEPS = 4, 5  # of an epoch
BATCH_NORM = [{"dense": {"units": 16}}, "batch_norm", "relu", {"dense": {"units": 4}}]
DROPOUT = [{"dense": {"units": 16}}, "relu", {"dropout": {"rate": 0.3}}, {"dense": {"units": 4}}]
IMAGES = {"flip": "horizontal", "crop": 1}
SCHEDULED = {"schedule": {"one_cycle": {}, "warm_up_epochs": 0.5}, "training": {"average": {"decay": 0.8}}}
STOPPING = {
    "schedule": {"reduce_on_plateau": {"patience": 0, "factor": 0.5}},
    "training": {"early_stopping": {"patience": 2}, "keep_best": True, "clip_norm": 0.5},
}
NESTEROV = {"local": {"steps": 2, "outer": "nesterov", "replica": "rank"}}
# name: (ranks, ranks a node, optimizer, sync, the job's other parts); 0 ranks a node: as they are.
JOBS = {
    "momentum": (2, 0, "momentum", "all_reduce", {}),
    "adam with schedule and average": (3, 0, "adam", "all_reduce", SCHEDULED),
    "dropout and augmentation": (2, 0, "momentum", "all_reduce", {"model": DROPOUT, "augment": IMAGES}),
    "batch_norm": (2, 0, "adam", "all_reduce", {"model": BATCH_NORM}),
    "int8 between nodes": (2, 1, "momentum", {"all_reduce": {"wire_format": "int8"}}, {}),
    "parameter server": (2, 1, "adam", "parameter_server", SCHEDULED),
    "int8 to servers": (2, 1, "momentum", {"parameter_server": {"wire_format": "int8"}}, {}),
    "local steps": (2, 0, "adam", NESTEROV, STOPPING | {"model": BATCH_NORM}),
    "early stopping and keep_best": (2, 0, "adam", "all_reduce", STOPPING),
    "reproducible": (2, 0, "adam", "all_reduce", {"training": {"reproducible": True, "average": {"decay": 0.8}}}),
}
OTHER_RANKS = {"momentum": 3, "adam with schedule and average": 1, "parameter server": 3, "reproducible": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    noisy = dict(np.load(write_data(folder / "data.npz", noise=True)))
    np.savez(folder / "images.npz", x=noisy["x"].reshape(SAMPLES, 5, 4), y=noisy["y"])
    return folder


def make_job(folder: Path, data: Path, name: str) -> tuple[int, int, Path]:
    ranks, per_node, optimizer, sync, parts = JOBS[name]
    parts = dict(parts)
    parts["training"] = {"epochs": EPOCHS} | parts.get("training", {})
    augment = parts.pop("augment", None)
    path = write_job(folder, data / ("images.npz" if augment else "data.npz"), optimizer, **parts)
    job = json.loads(path.read_text()) | {"sync": sync}
    if augment:
        job["data"]["augment"] = augment
    path.write_text(json.dumps(job))
    return ranks, per_node, path


@pytest.fixture
def run(run_ranks):
    """run(ranks, ranks a node, (rank, step, signal) or None, arguments, code=0): what it printed."""

    def run(ranks: int, per_node: int, signalled: tuple | None, *arguments: object, code: int = 0) -> str:
        program = [STOPPED, per_node, *(signalled or (0, 0, "SIGTERM"))]
        done = run_ranks(ranks, [*program, "train", *arguments], timeout_seconds=100)
        assert done.returncode == code, done.stdout + done.stderr
        return str(done.stdout)

    return run


def assert_same(folder: Path, reference: Path) -> None:
    result, expected = (load_file(path / "model.safetensors") for path in (folder, reference))
    assert result.keys() == expected.keys()
    assert all(np.array_equal(result[name], expected[name]) for name in result)


def losses_of_epochs(folder: Path) -> dict[int, float]:
    """The sum of the loss over all samples of each epoch, from the lines of metrics.jsonl."""
    sums: dict[int, float] = {}
    before = 0
    for line in metrics(folder):
        here = line["samples"] - before
        sums[line["epoch"]] = sums.get(line["epoch"], 0.0) + line.get("loss", 0.0) * here
        before = line["samples"]
    return sums


def assert_metrics_go_on(folder: Path, reference: Path) -> None:
    """No sample of any epoch is missing from the lines or in two of them, and evaluations are the same."""
    lines, expected = metrics(folder), metrics(reference)
    places = [(line["step"], "validation_loss" in line) for line in lines]
    assert places == sorted(set(places))
    ends = [[(line["step"], line["validation_loss"]) for line in these if "validation_loss" in line] for these in (lines, expected)]  # fmt: skip  # noqa: E501
    assert ends[0] == ends[1]
    sums, wanted = losses_of_epochs(folder), losses_of_epochs(reference)
    assert sums == {epoch: pytest.approx(loss, rel=1e-9) for epoch, loss in wanted.items()}
    for name in ("steps", "samples", "train_loss", "validation_loss", "best_epoch", "stopped_early"):
        assert summary(folder).get(name) == summary(reference).get(name)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", JOBS)
def test_interrupted_and_resumed_equals_never_interrupted(run, data, tmp_path, name) -> None:
    ranks, per_node, job = make_job(tmp_path, data, name)
    whole, parts, other = (tmp_path / folder for folder in ("whole", "parts", "other"))
    run(ranks, per_node, None, job, "-o", whole)
    draw = random.Random(name)
    step = STEPS * draw.randrange(1, EPOCHS - 1) + draw.randrange(1, STEPS + 1)
    where = draw.randrange(ranks), step, draw.choice(["SIGTERM", "SIGUSR1"])
    said = run(ranks, per_node, where, job, "-o", parts, code=5)
    stopped = re.search(rf"^stopped by {where[2]} after step (\d+); checkpoint (\S+): go on with --resume$", said, re.M)
    assert stopped, said
    # Replicas meet behind each second step of an epoch, and at its end; there alone nodes have the servers' weights.
    end = -(-step // STEPS) * STEPS
    meeting = {"local steps": min(step + (step % STEPS) % 2, end), "int8 to servers": end}.get(name, step)
    assert int(stopped[1]) == meeting
    assert Path(stopped[2]).name == f"step-{meeting:09d}.safetensors"
    assert not (parts / "model.safetensors").exists()
    shutil.copytree(parts, other)

    assert f"resuming after step {meeting} " in run(ranks, per_node, None, job, "-o", parts, "--resume")
    assert_same(parts, whole)
    assert_metrics_go_on(parts, whole)
    if name in OTHER_RANKS:
        run(OTHER_RANKS[name], per_node, None, job, "-o", other, "--resume")
        if name == "reproducible":
            assert_same(other, whole)
        else:
            assert_close(load_file(other / "model.safetensors"), load_file(whole / "model.safetensors"))


@pytest.mark.timeout(300)
def test_a_killed_run_goes_on_from_its_newest_good_checkpoint_within_the_epoch(run, run_ranks, data, tmp_path) -> None:
    ranks, per_node, job = make_job(tmp_path, data, "adam with schedule and average")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(ranks, per_node, None, job, "-o", whole)
    killed = [STOPPED, 0, 1, 14, "SIGKILL", "train", job, "-o", parts, "--set", "training.checkpoint_steps=1"]
    assert run_ranks(ranks, killed, timeout_seconds=100).returncode != 0
    checkpoints = sorted(parts.glob("checkpoints/step-*.safetensors"))
    steps = [int(path.stem.removeprefix("step-")) for path in checkpoints]
    # That after step 13 may have been on its way; it was begun when the one before was complete.
    assert steps in ([11, 12], [12, 13])
    newest = checkpoints[-1]
    newest.write_bytes(newest.read_bytes()[:-1] + b"\xff")
    (parts / "checkpoints" / ".step-000000014.safetensors.1.tmp").write_bytes(b"half")

    said = run(ranks, per_node, None, job, "-o", parts, "--resume", "--set", "training.keep_checkpoints=1")
    assert f"skipped a checkpoint: {newest}: is damaged: its sha256 does not match what it holds\n" in said
    assert f"resuming after step {steps[0]} (epoch 2, after {steps[0] - 10} steps of epoch 3)\n" in said
    assert_same(parts, whole)
    assert_metrics_go_on(parts, whole)
    assert [path.name for path in (parts / "checkpoints").iterdir()] == ["step-000000020.safetensors"]


@pytest.mark.parametrize("sync", ["all_reduce", "parameter_server"])
def test_mpirun_hands_sigusr1_on_to_all_ranks_which_stop_together(start_ranks, run, data, tmp_path, sync) -> None:
    """How a coordinator has a job pause: one signal to mpirun, and its exit code says that there is more to do."""
    job = write_job(tmp_path, data / "data.npz", sync=sync, training={"epochs": 1_000_000})
    launcher = start_ranks(2, ["-m", "worker", "train", job, "-o", tmp_path / "out"])
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out/checkpoints/step-*")):
        assert time.monotonic() < deadline, "no epoch was done in 60 s"
        time.sleep(0.02)
    launcher.send_signal(signal.SIGUSR1)
    said, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 5, said + errors
    assert "started again" not in errors  # a server, which the signal reaches too
    stopped = re.search(r"^stopped by SIGUSR1 after step (\d+); checkpoint (\S+): go on with --resume$", said, re.M)
    assert stopped, said
    more = int(stopped[1]) // STEPS + 1
    said = run(2, 0, None, job, "-o", tmp_path / "out", "--resume", "--set", f"training.epochs={more}")
    assert f"resuming after step {stopped[1]} " in said


def test_a_step_that_outlasts_the_grace_ends_the_job_with_a_line_that_says_so(start_ranks, data, tmp_path) -> None:
    job = write_job(tmp_path, data / "data.npz", training={"epochs": 1_000_000})
    settings = ["--set", "limits.grace_seconds=0.5"]
    launcher = start_ranks(2, ["-m", "worker", "train", job, "-o", tmp_path / "out", *settings])
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out/checkpoints/step-*")):
        assert time.monotonic() < deadline, "no epoch was done in 60 s"
        time.sleep(0.02)
    os.kill(rank_process(launcher, 1), signal.SIGSTOP)
    os.kill(rank_process(launcher, 0), signal.SIGTERM)
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    said = (
        r"error: rank 0 of 2 on \S+: step \d+ \(epoch \d+\), phase \w+: told to end by SIGTERM 0\.5 s ago and the "
        r"step is not done: it ends without a checkpoint; raise limits\.grace_seconds"
    )
    assert any(re.match(said, line) for line in error_lines(errors)), errors


def test_nodes_at_their_own_pace_stop_together_when_the_epoch_ends(run, data, tmp_path) -> None:
    job = write_job(tmp_path, data / "data.npz", sync="parameter_server", training={"epochs": EPOCHS})
    mode = {"parameter_server": {"mode": "asynchronous"}}
    job.write_text(json.dumps(json.loads(job.read_text()) | {"sync": mode}))
    said = run(2, 0, (1, 7, "SIGTERM"), job, "-o", tmp_path / "out", code=5)
    assert "stopped by SIGTERM after step 10; checkpoint " in said
    assert "resuming after step 10 " in run(2, 0, None, job, "-o", tmp_path / "out", "--resume")
    assert [line["epoch"] for line in metrics(tmp_path / "out") if "validation_loss" in line] == [1, 2, 3, 4]
