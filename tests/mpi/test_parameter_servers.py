"""Several parameter servers under mpirun: the weights of an all-reduce, and the same bits for any number of servers.

On nodes of any size, resumed with other numbers, and through the death of a server.
"""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.mpi.jobs import EPOCHS, assert_close, metrics, summary, train, write_data, write_job
from tests.mpi.mpirun import error_lines

NODES = Path(__file__).with_name("programs") / "train_on_nodes.py"
AVERAGED = {"average": {"decay": 0.9}}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data.npz")


def servers(count: int, **settings: object) -> dict:
    return {"parameter_server": {"servers": count, **settings}}


def assert_same_bits(result: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    for name, array in result.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_number_of_servers_gives_the_same_bits_and_the_weights_of_an_all_reduce(
    run_ranks, data, tmp_path, ranks
) -> None:
    reference = train(run_ranks, 1, write_job(tmp_path, data, training=AVERAGED), tmp_path / "all-reduce")
    results = []
    for count in (1, 2, 3, 4):
        job = write_job(tmp_path, data, training=AVERAGED, sync=servers(count))
        results.append(train(run_ranks, ranks, job, tmp_path / f"{count}"))
        assert_close(results[-1], reference)
        told = summary(tmp_path / f"{count}")["exchange"]
        assert (told["servers"], told["shard_restarts"], told["steps_lost"]) == (count, 0, 0)
    for result in results[1:]:
        assert_same_bits(result, results[0])
    for line, expected in zip(metrics(tmp_path / "4"), metrics(tmp_path / "all-reduce"), strict=True):
        assert line["validation_loss"] == pytest.approx(expected["validation_loss"], rel=1e-5)


@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_nodes_of_one_rank_and_unequal_nodes_give_the_weights_of_an_all_reduce(
    run_ranks, data, tmp_path, ranks_per_node
) -> None:
    reference = train(run_ranks, 1, write_job(tmp_path, data), tmp_path / "all-reduce")
    for count in (1, 3):
        output = tmp_path / str(count)
        job = write_job(tmp_path, data, sync=servers(count))
        done = run_ranks(3, [NODES, ranks_per_node, "train", job, "-o", output])
        assert done.returncode == 0, done.stderr
        assert_close(load_file(output / "model.safetensors"), reference)


def test_a_node_sends_and_takes_the_vector_once_whatever_its_ranks(run_ranks, data, tmp_path) -> None:
    job = write_job(tmp_path, data, training={"epochs": 1}, sync=servers(2))
    sent = []
    for ranks in (1, 3):
        train(run_ranks, ranks, job, tmp_path / str(ranks))
        sent.append(summary(tmp_path / str(ranks))["exchange"]["node_pushed_bytes"])
    assert sent[0] == sent[1] > 4 * 5 * 804  # five steps of 804 elements


def test_a_run_is_resumed_with_another_number_of_servers_and_after_an_all_reduce(run_ranks, data, tmp_path) -> None:
    whole = train(run_ranks, 2, write_job(tmp_path, data), tmp_path / "whole")
    output = tmp_path / "parts"
    for epochs, sync in ((2, "all_reduce"), (4, servers(3)), (6, servers(2)), (EPOCHS, "all_reduce")):
        job = write_job(tmp_path, data, sync=sync)
        resume = ["--resume"] if epochs > 2 else []
        weights = train(run_ranks, 2, job, output, "--set", f"training.epochs={epochs}", *resume)
    assert_close(weights, whole)


def test_a_model_too_small_for_so_many_servers_takes_fewer_and_says_so(run_ranks, data, tmp_path) -> None:
    job = write_job(tmp_path, data, training={"epochs": 1}, sync=servers(64))
    done = run_ranks(1, ["-m", "worker", "train", job, "-o", tmp_path / "o", "--set", "model=[{dense: {units: 4}}]"])
    assert done.returncode == 0, done.stderr
    assert "6 parameter servers instead of 64: the model has 84 parameters" in done.stdout


@pytest.mark.parametrize(
    ("optimizer", "training", "words"),
    [("adam", {"clip_norm": 1.0}, "2 beside training.clip_norm"), ("lamb", {}, "2 beside optimizer lamb")],
)
def test_what_needs_the_whole_gradient_is_refused_beside_several_servers(
    run_ranks, data, tmp_path, optimizer, training, words
) -> None:
    job = write_job(tmp_path, data, optimizer, training=training, sync=servers(2))
    done = run_ranks(2, ["-m", "worker", "train", job, "-o", tmp_path / "out"])
    assert done.returncode == 2
    errors = error_lines(done.stderr)
    assert len(errors) == 1
    assert f"sync.parameter_server.servers: {words}, which needs the whole gradient in one place" in errors[0]


def test_a_server_killed_in_training_comes_back_and_the_summary_says_what_was_lost(start_ranks, data, tmp_path) -> None:
    job = write_job(tmp_path, data, training={"epochs": 400}, sync=servers(2, snapshot_steps=5))
    output = tmp_path / "out"
    run = start_ranks(2, ["-m", "worker", "train", job, "-o", output])
    deadline = time.monotonic() + 30
    while not (output / "metrics.jsonl").exists() or not metrics(output):
        assert time.monotonic() < deadline
        assert run.poll() is None
        time.sleep(0.02)
    os.kill(server_processes(run.pid)[1], signal.SIGKILL)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 0, errors
    told = summary(output)["exchange"]
    assert told["shard_restarts"] == 1
    assert f", {told['steps_lost']} steps are lost" in errors
    assert "ended with code -9; it is started again from its last snapshot (1 of 3 times)" in errors
    assert summary(output)["steps"] == 400 * 5


def server_processes(ancestor: int) -> list[int]:
    """The shards under one mpirun, in the order of their start."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and _is_server(folder) and ancestor in _ancestors(int(folder.name)):
            found.append(int(folder.name))
    return sorted(found)


def _is_server(folder: Path) -> bool:
    try:
        return b"serve-parameters" in (folder / "cmdline").read_bytes().split(b"\0")
    except OSError:  # it ended meanwhile
        return False


def _ancestors(pid: int) -> list[int]:
    found = []
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        found.append(pid)
    return found
