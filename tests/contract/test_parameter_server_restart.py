"""A shard's process is killed in each phase: it comes back from its snapshot, workers go on and say what is lost.

Rows of the fault table (tests/mpi/test_fault_table.py).
"""

import contextlib
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from protos import job_pb2, rules
from protos.job_file import parse_job
from worker.checkpoint import Checkpoint
from worker.errors import TrainingFault
from worker.server import supervision
from worker.server.process import Part
from worker.server.supervision import SupervisedServer
from worker.sync.parameter_server import ParameterServerExchange

TOKEN, DIGEST, COUNT, CUT = "a token of this test", "ab" * 32, 64, 32
RATE = 0.25
FAULTY_SERVER = Path(__file__).with_name("faulty_server.py")


def job(snapshot_steps: int) -> job_pb2.JobSpec:
    return rules.resolve(
        parse_job(
            "{data: {train: {built_in: digits}}, model: [{dense: {units: 10}}], loss: softmax_cross_entropy,"
            "optimizer: {sgd: {learning_rate: 0.25}},"
            f"sync: {{parameter_server: {{servers: 2, snapshot_steps: {snapshot_steps}}}}}}}"
        )
    )


class Fleet:
    """Shards of 32 elements each, two unless told otherwise, and the workers' connections."""

    def __init__(self, workers: int, snapshot_steps: int, return_seconds: float, shards: int = 2) -> None:
        self.shards = [
            SupervisedServer(
                job(snapshot_steps),
                Checkpoint(0, 0, 0, DIGEST, [], np.zeros(CUT, np.float32), {}),
                *(Part(first * CUT, shards * CUT), workers, 3, TOKEN, "127.0.0.1"),
            )
            for first in range(shards)
        ]
        self.weights = [np.zeros(shards * CUT, np.float32) for _ in range(workers)]
        self.gradient = np.ones(shards * CUT, np.float32)
        self.workers = [
            ParameterServerExchange(
                [shard.address for shard in self.shards], worker, workers, 3, TOKEN, DIGEST, self.weights[worker],
                self.gradient, np.zeros(1), timeout_seconds=20, return_seconds=return_seconds,
            )
            for worker in range(workers)
        ]  # fmt: skip
        for worker in self.workers:
            assert worker.join() == 0

    def step(self, step: int) -> None:
        with ThreadPoolExecutor(len(self.workers)) as pool:
            list(pool.map(lambda worker: worker.step(step, len(self.workers), RATE), self.workers))

    def kill(self, shard: int) -> None:
        pid = self.shards[shard].pid
        os.kill(pid, signal.SIGKILL)

    def snapshot_at(self, shard: int, step: int) -> None:
        """Wait until the shard's snapshot is of `step`."""
        from worker.checkpoint import read_checkpoint

        path = Path(self.shards[shard]._snapshot)
        deadline = time.monotonic() + 10
        while read_checkpoint(path).step != step:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def stop(self) -> None:
        for worker in self.workers:
            worker.close()
        for shard in self.shards:
            shard.stop()


@pytest.fixture
def fleet() -> Iterator[Callable[..., Fleet]]:
    with contextlib.ExitStack() as stack:

        def start(workers: int = 1, snapshot_steps: int = 100, return_seconds: float = 15.0, shards: int = 2) -> Fleet:
            made = Fleet(workers, snapshot_steps, return_seconds, shards)
            stack.callback(made.stop)
            return made

        yield start


def test_signals_that_end_a_job_are_left_to_the_rank_that_keeps_the_server_alive(fleet) -> None:
    """Slurm signals every process of a job, and mpirun those that a rank has started too."""
    running = fleet()
    processes = [shard.pid for shard in running.shards]
    for process in processes:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(process, number)
    running.step(1)
    np.testing.assert_array_equal(running.weights[0], np.full(COUNT, -RATE, np.float32))
    assert [shard.pid for shard in running.shards] == processes
    assert running.workers[0].restarts == 0


def test_killed_before_the_first_step_nothing_is_lost(fleet) -> None:
    running = fleet()
    running.kill(1)
    running.step(1)
    np.testing.assert_array_equal(running.weights[0], np.full(COUNT, -RATE, np.float32))
    assert (running.workers[0].restarts, running.workers[0].steps_lost) == (1, 0)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("where", ["push", "apply", "answer", "pull"])
def test_killed_within_a_step_the_weights_are_those_of_an_undisturbed_run(
    fleet, monkeypatch, tmp_path, where, shards
) -> None:
    program = (sys.executable, str(FAULTY_SERVER), where, str(tmp_path / "happened"), "serve-parameters")
    start_process = functools.partial(supervision.start_server_process, program=program)
    monkeypatch.setattr(supervision, "start_server_process", start_process)
    monkeypatch.setenv("PYTHONPATH", str(FAULTY_SERVER.parents[2]))
    kept = 2 if where == "pull" else 1  # the step before that in which it dies, whose snapshot is the first
    running = fleet(snapshot_steps=kept, shards=shards)
    [worker], [weights] = running.workers, running.weights
    began = time.monotonic()
    for step in (1, 2):
        running.step(step)
        for shard in range(shards if step == kept else 0):
            running.snapshot_at(shard, step)
    np.testing.assert_array_equal(worker.pull(state=True)["parameters"], weights)
    running.step(3)
    seconds = time.monotonic() - began
    print(f"row parameter_server server kill   {where:10} {seconds:5.1f} s  {shards} servers, 0 steps lost")
    np.testing.assert_array_equal(weights, np.full(shards * CUT, -3 * RATE, np.float32))
    assert (worker.restarts, worker.steps_lost) == (1, 0)


def test_killed_between_steps_it_goes_on_from_its_snapshot_and_the_other_shard_loses_nothing(fleet) -> None:
    running = fleet(workers=2, snapshot_steps=2)
    for step in (1, 2, 3):
        running.step(step)
        if step == 2:
            running.snapshot_at(0, 2)
    running.kill(0)
    for step in (4, 5):
        running.step(step)
    for weights, worker in zip(running.weights, running.workers, strict=True):
        # Steps 1, 2, 4 and 5 on the killed shard's elements, all five on the other's.
        np.testing.assert_array_equal(weights[:CUT], np.full(CUT, -4 * RATE, np.float32))
        np.testing.assert_array_equal(weights[CUT:], np.full(CUT, -5 * RATE, np.float32))
        assert (worker.restarts, worker.steps_lost) == (1, 1)


def test_killed_while_a_step_waits_for_the_other_worker_each_push_counts_once(fleet) -> None:
    running = fleet(workers=2)
    running.step(1)
    first = threading.Thread(target=running.workers[0].step, args=(2, 2, RATE))
    first.start()
    running.kill(1)
    running.workers[1].step(2, 2, RATE)
    first.join(20)
    assert not first.is_alive()
    for weights, worker in zip(running.weights, running.workers, strict=True):
        np.testing.assert_array_equal(weights[:CUT], np.full(CUT, -2 * RATE, np.float32))
        np.testing.assert_array_equal(weights[CUT:], np.full(CUT, -RATE, np.float32))
        assert worker.steps_lost == 1


def test_killed_before_a_pull_the_pull_waits_for_it_and_training_goes_on(fleet) -> None:
    running = fleet(snapshot_steps=0)
    running.step(1)
    running.workers[0].pull(state=True)  # as at a checkpoint: leaves a snapshot
    running.snapshot_at(1, 1)
    running.kill(1)
    pulled = running.workers[0].pull(state=True)
    np.testing.assert_array_equal(pulled["parameters"], running.weights[0])
    running.step(2)
    np.testing.assert_array_equal(running.weights[0], np.full(COUNT, -2 * RATE, np.float32))
    assert (running.workers[0].restarts, running.workers[0].steps_lost) == (1, 0)


def test_killed_behind_the_last_step_a_pull_tells_and_what_is_lost_is_counted_before_the_next(fleet, capfd) -> None:
    running = fleet(workers=2)
    running.step(1)
    running.kill(1)
    first, second = running.workers
    assert not first.found_returned
    behind = first.pull(state=False)["parameters"]
    np.testing.assert_array_equal(behind, [*np.full(CUT, -RATE), *np.zeros(CUT)])
    assert (first.found_returned, first.steps_lost) == (True, 0)
    with ThreadPoolExecutor(2) as pool:  # it answers once both are there
        list(pool.map(ParameterServerExchange.meet_again, running.workers))
    np.testing.assert_array_equal(first.pull(state=False)["parameters"], behind)
    for worker in (first, second):
        assert (worker.found_returned, worker.restarts, worker.steps_lost) == (False, 1, 1)
    lines = [line for line in capfd.readouterr().err.splitlines() if "is back at step 1: " in line]
    assert len(lines) == 2
    assert all(line.endswith("elements 32 to 63 are those after step 0, 1 steps are lost") for line in lines)
    running.step(2)
    np.testing.assert_array_equal(running.weights[0], [*np.full(CUT, -2 * RATE), *np.full(CUT, -RATE)])
    assert first.restarts == 1


def test_a_worker_can_leave_a_server_that_is_gone(fleet, monkeypatch) -> None:
    monkeypatch.setattr(supervision, "RESTARTS", 0)
    running = fleet()
    running.step(1)
    running.kill(1)
    running.workers[0].leave()
    np.testing.assert_array_equal(running.weights[0], np.full(COUNT, -RATE, np.float32))


def test_one_that_stays_away_ends_the_step_in_time_and_is_named(fleet, monkeypatch, capfd) -> None:
    monkeypatch.setattr(supervision, "RESTARTS", 0)
    running = fleet(return_seconds=1.0)
    address = running.shards[1].address
    running.kill(1)
    began = time.monotonic()
    words = rf"{address} \(2 of 2\), step 1: it is gone and did not come back within 1 s"
    with pytest.raises(TrainingFault, match=words):
        running.step(1)
    assert time.monotonic() - began < 10
    assert f"{address} ended with code -9" in capfd.readouterr().err
