"""mpirun across hosts: namespaces with sshd on this machine (hosts.py). Slow for tests, so few."""

import re
import signal
import sys
import time
from collections.abc import Iterator
from os import kill
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.mpi.hosts import Hosts, enter, make_hosts, why_not
from tests.mpi.jobs import assert_close, metrics, summary, train, write_data, write_job
from tests.mpi.mpirun import error_lines
from tests.mpi.test_guests import Program
from worker.checkpoint import list_checkpoints, read_checkpoint

STALL_SECONDS = 3.0
ENDS_WITHIN_SECONDS = 20.0  # the limit, the launcher's own patience with a host that is gone, and a busy machine


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with make_hosts(2) as made:
        yield made


@pytest.mark.parametrize("ranks", [(2, 2), (2, 1), (1, 2)])
def test_hosts_train_as_one_rank_does(hosts, run_ranks, tmp_path, ranks) -> None:
    job = write_job(tmp_path, write_data(tmp_path / "toy.npz"))
    reference = train(run_ranks, 1, job, tmp_path / "alone")
    done = hosts.run(ranks, ["-m", "worker", "train", job, "-o", tmp_path / "out"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert_close(load_file(tmp_path / "out" / "model.safetensors"), reference)
    told = summary(tmp_path / "out")
    assert told["world_size"] == sum(ranks)
    assert told["exchange"]["bucket_bytes"] > 0  # two nodes were seen, whose ranks share no memory


@pytest.mark.parametrize("servers", [1, 3])
def test_parameter_servers_on_two_hosts_are_reached_by_all_and_train_as_one_rank_does(
    hosts, run_ranks, tmp_path, servers
) -> None:
    data = write_data(tmp_path / "toy.npz")
    reference = train(run_ranks, 1, write_job(tmp_path, data), tmp_path / "alone")
    job = write_job(tmp_path, data, sync={"parameter_server": {"servers": servers}})
    done = hosts.run((2, 1), ["-m", "worker", "train", job, "-o", tmp_path / "out"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert_close(load_file(tmp_path / "out" / "model.safetensors"), reference)


def test_a_guest_on_another_host_takes_part_and_the_weights_are_those_of_one_rank_alone(
    hosts, run_ranks, tmp_path
) -> None:
    terms = {"optimizer": "sgd", "training": {"epochs": 20}}
    data = write_data(tmp_path / "toy.npz")
    reference = train(run_ranks, 1, write_job(tmp_path, data, **terms), tmp_path / "alone")
    job = write_job(tmp_path, data, sync={"parameter_server": {"servers": 2, "guests": True}}, **terms)
    out, worker = tmp_path / "out", [sys.executable, "-m", "worker"]
    programs = []
    try:
        programs.append(Program([*enter(hosts[0]), *worker, "train", str(job), "-o", str(out)], tmp_path / "job.log"))
        programs[0].wait_for(rf"guests may come: paceline-worker join {re.escape(hosts[0].address)}:\d+ ")
        programs[0].signal(signal.SIGSTOP)  # until the guest is there
        programs.append(Program([*enter(hosts[1]), *worker, "join", str(out)], tmp_path / "guest.log"))
        programs[1].wait_for(r"joined as guest 1")
        programs[0].signal(signal.SIGCONT)
        programs[0].end()
        steps = int(re.search(r"(\d+) steps done here", programs[1].end())[1])
    finally:
        for program in programs:
            if program.process.poll() is None:
                program.process.kill()
                program.process.wait(20)
    assert 0 < steps < 100
    assert summary(out)["exchange"]["guests"] == 1
    assert_close(load_file(out / "model.safetensors"), reference)


def test_a_host_with_too_little_shared_memory_says_so_and_trains_on(run_ranks, tmp_path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    job = write_job(tmp_path, write_data(tmp_path / "toy.npz"))
    reference = train(run_ranks, 1, job, tmp_path / "alone")
    with make_hosts(2, shared_memory_megabytes={1: 1}) as hosts:
        done = hosts.run((2, 2), ["-m", "worker", "train", job, "-o", tmp_path / "out"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "shared memory is not used: host2: /dev/shm has 1 MB free" in done.stdout
    assert_close(load_file(tmp_path / "out" / "model.safetensors"), reference)


@pytest.mark.parametrize("fault", ["killed", "stopped", "unplugged"])
def test_a_host_that_fails_ends_the_run_in_time_and_leaves_its_checkpoints(tmp_path, fault) -> None:
    if reason := why_not():
        pytest.skip(reason)
    endless, limits = {"epochs": 100_000}, {"stall_seconds": STALL_SECONDS}
    job = write_job(tmp_path, write_data(tmp_path / "toy.npz"), training=endless, limits=limits)
    out = tmp_path / "out"
    with make_hosts(2) as hosts:
        run = hosts.start((2, 2), ["-m", "worker", "train", job, "-o", out])
        await_steps(out, run)
        began = time.monotonic()
        victims = hosts[1].ranks()
        assert len(victims) == 2
        if fault == "killed":
            kill(victims[0], signal.SIGKILL)
        elif fault == "stopped":
            kill(victims[0], signal.SIGSTOP)
        else:
            hosts[1].unplug()
        _, errors = run.communicate(timeout=ENDS_WITHIN_SECONDS)
        assert time.monotonic() - began < ENDS_WITHIN_SECONDS
    assert run.returncode != 0
    assert "Traceback" not in errors
    # That a process died mpirun itself says. A stopped rank its neighbour knows; of a host is known what it last sent.
    said = {
        "stopped": r"error: rank [23] of 4 on host2: no progress for \d+ s in step \d+ ",
        "unplugged": r"error: rank [01] of 4 on host1: no progress for \d+ s .*; waits for "
        r"rank 2 on host2 \(heard of \d+ s ago in step \d+ \(epoch \d+\), phase \w+\) or "
        r"rank 3 on host2 \(heard of \d+ s ago in step \d+ \(epoch \d+\), phase \w+\): ",
    }
    if fault in said:
        assert any(re.match(said[fault], line) for line in error_lines(errors)), errors
    newest = list_checkpoints(out / "checkpoints")[-1]
    assert read_checkpoint(newest).step > 0


def await_steps(out: Path, run) -> None:
    """Until ranks are in the midst of steps, for as long as hosts need to hear of each other."""
    deadline = time.monotonic() + 30
    while not (out / "metrics.jsonl").exists() or not (lines := metrics(out)) or lines[-1]["wall_seconds"] < 2:
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline, "no report within 30 s"
        time.sleep(0.05)
