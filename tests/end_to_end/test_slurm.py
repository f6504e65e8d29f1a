"""Jobs through a real Slurm of one node, which these tests start: trained, held, cancelled, failed, taken over."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest

from protos import coordinator_pb2 as pb
from protos import coordinator_pb2_grpc, job_pb2
from protos.job_file import parse_job
from tests.benchmarks.recovery import rank_process
from tests.end_to_end.jobs import ENDED, NEEDS_MPIRUN, watch
from tests.end_to_end.slurm_cluster import slurm, slurm_cluster, why_not

pytestmark = NEEDS_MPIRUN
WAIT_SECONDS = 100.0
CORES = 4
JOB = """
name: digits
data: {{train: {{built_in: digits}}, scale: 0.0625}}
model: [{{dense: {{units: 10}}}}]
loss: softmax_cross_entropy
optimizer: {{sgd: {{learning_rate: {learning_rate}}}}}
training: {{epochs: {epochs}, batch_size: 32, seed: 1, checkpoint_steps: 1000}}
workers: {workers}
limits: {{retries: 1}}
"""
ENDLESS = 1_000_000


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    if reason := why_not():
        pytest.skip(reason)
    with slurm_cluster(CORES) as variables:
        yield variables


class Talk:
    """A coordinator in a process of its own, which may be killed, and a stub of its service."""

    def __init__(self, state: Path, cluster: dict[str, str]) -> None:
        program = Path(sys.executable).with_name("paceline")
        words = ["serve", "--launcher", "slurm", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]
        self.state = state
        self.process = subprocess.Popen(
            [program, *words, "--state", state, "--launcher-option", "partition=main"],
            env=os.environ | cluster,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        ready = self.process.stdout.readline()
        assert f", {CORES} slots" in ready, ready
        self.channel = grpc.insecure_channel(ready.split("grpc ")[1].split(",")[0])
        self.stub = coordinator_pb2_grpc.CoordinatorServiceStub(self.channel)

    def submit(self, epochs: int = 1, workers: int = 2, learning_rate: str = "0.01") -> str:
        spec = parse_job(JOB.format(epochs=epochs, workers=workers, learning_rate=learning_rate))
        return self.stub.SubmitJob(pb.SubmitJobRequest(spec=spec), timeout=WAIT_SECONDS).job.id

    def until(self, job_id: str, wanted) -> job_pb2.Job:
        return watch(self.stub, job_id, wanted, WAIT_SECONDS)

    def until_ended(self, job_id: str) -> job_pb2.Job:
        return self.until(job_id, lambda job: job.state in ENDED)

    def until_running(self, job_id: str) -> job_pb2.Job:
        return self.until(job_id, lambda job: job.state == job_pb2.JOB_STATE_RUNNING)

    def cancel(self, job_id: str) -> None:
        self.stub.CancelJob(pb.CancelJobRequest(job_id=job_id), timeout=WAIT_SECONDS)


@contextmanager
def served(state: Path, cluster: dict[str, str]) -> Iterator[Talk]:
    talk = Talk(state, cluster)
    try:
        yield talk
    finally:
        talk.channel.close()
        talk.process.send_signal(signal.SIGINT)  # ends what it launched
        talk.process.communicate(timeout=WAIT_SECONDS)


@pytest.fixture(scope="module")
def talk(cluster: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talk]:
    with served(tmp_path_factory.mktemp("slurm") / "state 1", cluster) as talk:
        yield talk


def states_of(job: job_pb2.Job) -> list[str]:
    """Each state once for a stay in it; what Slurm's queue does is within STARTING."""
    names = [job_pb2.JobState.Name(change.state).removeprefix("JOB_STATE_") for change in job.history]
    return [name for name, before in zip(names, ["", *names], strict=False) if name != before]


def jobs_of(cluster: dict[str, str], job_id: str, states: str = "all") -> list[str]:
    said = slurm(cluster, "squeue", "--noheader", f"--states={states}", "--format=%T %j")
    return [line.split()[0] for line in said.splitlines() if line.split()[1].startswith(f"paceline-{job_id}-")]


def test_a_job_trains_on_two_ranks_in_slurm_and_succeeds(talk: Talk, cluster: dict[str, str]) -> None:
    job = talk.until_ended(talk.submit(epochs=3))
    assert (states_of(job), job.attempt) == (["QUEUED", "STARTING", "RUNNING", "SUCCEEDED"], 1), job
    assert job.summary.world_size == 2
    assert len(jobs_of(cluster, job.id)) == 1


def test_a_cancelled_job_is_cancelled_in_slurm_too(talk: Talk, cluster: dict[str, str]) -> None:
    job_id = talk.submit(epochs=ENDLESS)
    talk.until_running(job_id)
    talk.cancel(job_id)
    job = talk.until_ended(job_id)
    assert states_of(job) == ["QUEUED", "STARTING", "RUNNING", "CANCELLING", "CANCELLED"]
    assert jobs_of(cluster, job_id, "RUNNING,PENDING") == []


def test_a_job_that_fails_in_slurm_names_the_ranks_own_cause(talk: Talk) -> None:
    job = talk.until_ended(talk.submit(epochs=50, learning_rate="1e38"))
    assert (job.state, job.attempt) == (job_pb2.JOB_STATE_FAILED, 1)
    assert job.reason in ("RankFailed", "RanksFailed")
    assert "; lower the learning rate (1e+38)" in job.message


def test_a_job_that_slurm_holds_says_slurms_reason_and_starts_when_it_is_let_go(
    talk: Talk, cluster: dict[str, str]
) -> None:
    slurm(cluster, "scontrol", "update", "PartitionName=main", "State=DOWN")
    try:
        job_id = talk.submit()
        held = talk.until(job_id, lambda job: job.reason.startswith("Held") and job.reason != "HeldForTurn")
        assert (held.state, held.reason) == (job_pb2.JOB_STATE_STARTING, "HeldByPartition")
        assert "waits (PartitionDown): its partition is closed" in held.message
    finally:
        slurm(cluster, "scontrol", "update", "PartitionName=main", "State=UP")
    job = talk.until_ended(job_id)
    assert job.state == job_pb2.JOB_STATE_SUCCEEDED
    reasons = [change.reason for change in job.history]
    assert any(reason.startswith("Held") for reason in reasons)


def test_what_slurm_ends_writes_a_checkpoint_first_and_says_who_ended_it(talk: Talk, cluster: dict[str, str]) -> None:
    job_id = talk.submit(epochs=ENDLESS)
    talk.until_running(job_id)
    slurm(cluster, "scancel", f"--name=paceline-{job_id}-1")
    job = talk.until_ended(job_id)
    assert (job.state, job.reason) == (job_pb2.JOB_STATE_FAILED, "CancelledElsewhere"), job
    assert "was cancelled in Slurm" in job.message
    logs = talk.stub.StreamLogs(pb.StreamLogsRequest(job_id=job_id), timeout=WAIT_SECONDS)
    assert any("stopped by SIGTERM" in line.line or "stopped by SIGUSR1" in line.line for line in logs)


def test_a_killed_rank_in_slurm_costs_one_retry(talk: Talk) -> None:
    job_id = talk.submit(epochs=ENDLESS)
    talk.until_running(job_id)
    os.kill(rank_process(job_id, 1), signal.SIGKILL)
    job = talk.until(job_id, lambda job: job.attempt == 2 and job.state == job_pb2.JOB_STATE_RUNNING)
    assert states_of(job) == ["QUEUED", "STARTING", "RUNNING", "RESTARTING", "STARTING", "RUNNING"]
    assert any(change.reason == "RankKilled" for change in job.history), job
    talk.cancel(job_id)
    talk.until_ended(job_id)


def test_a_paused_job_leaves_slurm_with_a_checkpoint_and_goes_on_from_it(talk: Talk, cluster: dict[str, str]) -> None:
    job_id = talk.submit(epochs=ENDLESS)
    talk.until_running(job_id)
    talk.stub.PauseJob(pb.PauseJobRequest(job_id=job_id), timeout=WAIT_SECONDS)
    paused = talk.until(job_id, lambda job: job.state == job_pb2.JOB_STATE_PAUSED)
    assert paused.message == "paused; its ranks wrote a checkpoint and left"
    assert jobs_of(cluster, job_id, "RUNNING,PENDING") == []
    talk.stub.ResumeJob(pb.ResumeJobRequest(job_id=job_id), timeout=WAIT_SECONDS)
    talk.until_running(job_id)
    talk.cancel(job_id)
    talk.until_ended(job_id)
    lines = talk.stub.StreamLogs(pb.StreamLogsRequest(job_id=job_id, rank=0), timeout=WAIT_SECONDS)
    assert any(line.line.startswith("resuming after step ") for line in lines)


def test_a_killed_coordinator_takes_its_slurm_jobs_over(cluster: dict[str, str], tmp_path: Path) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(served(tmp_path, cluster))
        running = first.submit(epochs=ENDLESS)
        first.until_running(running)
        waiting = first.submit(workers=3)  # more than is left
        first.until(waiting, lambda job: job.state == job_pb2.JOB_STATE_QUEUED and job.reason == "WaitingForSlots")
        first.process.kill()
        first.process.wait(WAIT_SECONDS)
        rank = rank_process(running, 0)
        second = stack.enter_context(served(tmp_path, cluster))
        job = second.until_running(running)
        assert (job.attempt, rank_process(running, 0)) == (1, rank)
        assert jobs_of(cluster, running) == ["RUNNING"]
        second.cancel(running)
        assert second.until_ended(running).state == job_pb2.JOB_STATE_CANCELLED
        assert second.until_ended(waiting).state == job_pb2.JOB_STATE_SUCCEEDED
    deadline = time.monotonic() + WAIT_SECONDS
    while jobs_of(cluster, running, "RUNNING,PENDING,COMPLETING"):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (
            "partition=nowhere",
            "sbatch refuses --partition=nowhere: allocation failure: Invalid partition name specified",
        ),
        ("partitions=main", "partitions=main: --launcher slurm takes partition (where jobs run); "),
        ("time=1 2", "time=1 2: nothing that sbatch's --time takes"),
    ],
)
def test_a_bad_option_is_refused_before_a_coordinator_serves(
    cluster: dict[str, str], tmp_path: Path, option: str, said: str
) -> None:
    program = Path(sys.executable).with_name("paceline")
    words = [program, "serve", "--launcher", "slurm", "--launcher-option", option, "--state", tmp_path / "state"]
    done = subprocess.run(words, env=os.environ | cluster, capture_output=True, text=True, timeout=WAIT_SECONDS)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == done.stderr.splitlines()[-1:]
    assert errors[0].startswith(f"error: --launcher-option: {said}")
