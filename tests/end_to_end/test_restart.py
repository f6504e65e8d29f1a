"""Real jobs that are killed, paused and left without their coordinator: they end in the bits of one left alone."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np
import pytest
from safetensors.numpy import load

from protos import coordinator_pb2 as pb
from protos import coordinator_pb2_grpc, job_pb2
from protos.job_file import parse_job
from tests.benchmarks.recovery import coordinator, rank_process
from tests.end_to_end.jobs import ENDED, NEEDS_MPIRUN, watch

pytestmark = NEEDS_MPIRUN
WAIT_SECONDS = 120.0
# Long enough to be met in its midst.
JOB = """
name: digits
data: {train: {built_in: digits}, validation_fraction: 0.2, scale: 0.0625}
model: [{dense: {units: 128}}, relu, {dense: {units: 10}}]
loss: softmax_cross_entropy
optimizer: {adam: {learning_rate: 0.0001}}
training: {epochs: 40, batch_size: 32, seed: 1, checkpoint_steps: 100}
workers: 2
limits: {retries: 2}
"""
Stub = coordinator_pb2_grpc.CoordinatorServiceStub


@pytest.fixture(scope="module")
def stub() -> Iterator[Stub]:
    with coordinator(slots=2) as stub:
        yield stub


@pytest.fixture(scope="module")
def alone(stub: Stub) -> dict[str, bytes]:
    """What the job leaves when nothing befalls it."""
    job = watch(stub, submit(stub), lambda job: job.state in ENDED, WAIT_SECONDS)
    assert job.attempt == 1, job
    return pulled(stub, job.id)


def submit(stub: Stub) -> str:
    return stub.SubmitJob(pb.SubmitJobRequest(spec=parse_job(JOB)), timeout=WAIT_SECONDS).job.id


def until_reported(stub: Stub, job_id: str) -> None:
    events = stub.WatchJob(pb.WatchJobRequest(job_id=job_id, after_step=100), timeout=WAIT_SECONDS)
    assert any(event.HasField("report") for event in events), "it ended before it was met in the midst"
    events.cancel()


def pulled(stub: Stub, job_id: str) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for piece in stub.PullArtifacts(pb.PullArtifactsRequest(job_id=job_id), timeout=WAIT_SECONDS):
        files[piece.path] = files.get(piece.path, b"") + piece.data
    return files


def assert_same_weights(one: dict[str, bytes], other: dict[str, bytes]) -> None:
    """To the bit; the order of a file's metadata is nobody's."""
    arrays, others = (load(files["model.safetensors"]) for files in (one, other))
    assert arrays.keys() == others.keys()
    assert all(np.array_equal(arrays[name], others[name]) for name in arrays)


def states_of(job: job_pb2.Job) -> list[str]:
    return [job_pb2.JobState.Name(change.state).removeprefix("JOB_STATE_") for change in job.history]


def steps_of(stub: Stub, job_id: str) -> list[int]:
    reports = stub.GetMetrics(pb.GetMetricsRequest(job_id=job_id), timeout=WAIT_SECONDS).reports
    return [report.step for report in reports]


def test_a_killed_rank_costs_seconds_and_changes_nothing_in_the_result(stub: Stub, alone: dict[str, bytes]) -> None:
    job_id = submit(stub)
    until_reported(stub, job_id)
    os.kill(rank_process(job_id, 1), signal.SIGKILL)
    restarting = watch(stub, job_id, lambda job: job.attempt == 2, WAIT_SECONDS)
    (lost,) = [change for change in restarting.history if change.state == job_pb2.JOB_STATE_RESTARTING]
    assert lost.reason == "RankKilled"
    assert "rank 1 on " in lost.message
    assert "was killed by signal 9 (SIGKILL)" in lost.message
    assert "goes on from its newest checkpoint (retry 1 of 2)" in lost.message
    job = watch(stub, job_id, lambda job: job.state in ENDED, WAIT_SECONDS)
    assert states_of(job) == ["QUEUED", *("STARTING", "RUNNING", "RESTARTING"), "STARTING", "RUNNING", "SUCCEEDED"]
    assert_same_weights(pulled(stub, job_id), alone)
    assert steps_of(stub, job_id) == sorted(steps_of(stub, job_id))
    lines = stub.StreamLogs(pb.StreamLogsRequest(job_id=job_id, rank=0), timeout=WAIT_SECONDS)
    assert any(line.line.startswith("resuming after step ") for line in lines)


def test_a_paused_job_gives_its_slots_away_and_ends_in_the_same_bits(stub: Stub, alone: dict[str, bytes]) -> None:
    job_id = submit(stub)
    until_reported(stub, job_id)
    asked = stub.PauseJob(pb.PauseJobRequest(job_id=job_id), timeout=WAIT_SECONDS).job
    assert (asked.state, asked.reason) == (job_pb2.JOB_STATE_RUNNING, "PauseRequested")
    paused = watch(stub, job_id, lambda job: job.state == job_pb2.JOB_STATE_PAUSED, WAIT_SECONDS)
    assert paused.message == "paused; its ranks wrote a checkpoint and left"
    other = submit(stub)
    watch(stub, other, lambda job: job.state == job_pb2.JOB_STATE_RUNNING, WAIT_SECONDS)
    stub.CancelJob(pb.CancelJobRequest(job_id=other), timeout=WAIT_SECONDS)
    resumed = stub.ResumeJob(pb.ResumeJobRequest(job_id=job_id), timeout=WAIT_SECONDS).job
    assert resumed.state == job_pb2.JOB_STATE_QUEUED
    job = watch(stub, job_id, lambda job: job.state in ENDED, WAIT_SECONDS)
    assert (job.state, job.attempt) == (job_pb2.JOB_STATE_SUCCEEDED, 2), job
    assert_same_weights(pulled(stub, job_id), alone)
    steps = steps_of(stub, job_id)
    assert steps == sorted(steps)


def test_a_job_trains_on_while_its_coordinator_is_dead_and_none_of_its_reports_is_lost(serve, tmp_path: Path) -> None:
    first, stub = serve()
    job_id = submit(stub)
    until_reported(stub, job_id)
    first.kill()
    first.communicate(timeout=WAIT_SECONDS)
    rank = rank_process(job_id, 0)
    second, stub = serve()
    job = watch(stub, job_id, lambda job: job.state in ENDED, WAIT_SECONDS)
    assert (states_of(job), job.attempt) == (["QUEUED", "STARTING", "RUNNING", "SUCCEEDED"], 1)
    assert not Path(f"/proc/{rank}").exists()
    written = (tmp_path / "state" / "jobs" / job_id / "output" / "metrics.jsonl").read_text().splitlines()
    assert len(steps_of(stub, job_id)) == len(written)
    second.terminate()
    assert second.wait(WAIT_SECONDS) == 0


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[], tuple[subprocess.Popen[str], Stub]]]:
    """Starts coordinators on one state folder, each on free ports."""
    with ExitStack() as opened:

        def start() -> tuple[subprocess.Popen[str], Stub]:
            command = [sys.executable, "-P", "-m", "coordinator", "serve", "--state", str(tmp_path / "state")]
            process = subprocess.Popen(
                [*command, "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--slots", "2"],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            opened.callback(process.communicate)
            opened.callback(process.kill)
            assert process.stdout is not None
            address = process.stdout.readline().partition("grpc ")[2].partition(",")[0]
            return process, Stub(opened.enter_context(grpc.insecure_channel(address)))

        yield start
