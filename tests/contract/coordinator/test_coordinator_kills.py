"""A coordinator killed with SIGKILL at random instants, while jobs are submitted, start, report, are cancelled and end.

What a client was told is true afterwards: no job is lost, none is run twice, none is left running.
"""

import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from coordinator.jobs import TRANSITIONS, JobState
from coordinator.launchers import keeper
from protos import coordinator_pb2 as pb
from protos import coordinator_pb2_grpc, job_pb2

KILLS = 30
SEED = 20261124
LONGEST_LIFE_SECONDS = 1.0  # of a coordinator that has become ready
STARTS_CUT_SHORT = 0.25  # of all: killed before they are ready
CALL_SECONDS = 10.0
END_SECONDS = 120.0  # for everything to come to its end under the last coordinator
NAMES = ("counted", "counted", "counted-mute", "long")  # the last is cancelled


class Submitter(threading.Thread):
    """Submits jobs one after the other, each until the coordinator has said yes, and cancels the long ones."""

    def __init__(self, address: str, make_spec: Callable[..., job_pb2.JobSpec]) -> None:
        super().__init__(daemon=True)
        self.jobs: dict[str, tuple[str, str]] = {}  # by request id: the job's id and name
        self.enough = threading.Event()
        self.fault: BaseException | None = None
        self._address, self._make_spec = address, make_spec

    def run(self) -> None:
        draw = random.Random(SEED)
        try:
            for number in itertools.count():
                if self.enough.is_set():
                    return
                name, request_id = draw.choice(NAMES), f"request-{number}"
                request = pb.SubmitJobRequest(spec=self._make_spec(name), request_id=request_id)
                job_id = self.insist("SubmitJob", request).job.id
                self.jobs[request_id] = job_id, name
                if name == "long":
                    time.sleep(draw.uniform(0, 1))
                    self.insist("CancelJob", pb.CancelJobRequest(job_id=job_id))
                time.sleep(draw.uniform(0, 0.5))
        except BaseException as fault:
            self.fault = fault

    def insist(self, method: str, request):
        """Call until somebody has answered."""
        deadline = time.monotonic() + END_SECONDS
        while True:
            with grpc.insecure_channel(self._address) as channel:
                try:
                    call = getattr(coordinator_pb2_grpc.CoordinatorServiceStub(channel), method)
                    return call(request, timeout=CALL_SECONDS)
                except grpc.RpcError as error:
                    nobody = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
                    # A cancel whose answer was lost may have been carried out.
                    if method == "CancelJob" and error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                        return None
                    if not nobody or time.monotonic() > deadline:
                        raise
            time.sleep(0.02)


@pytest.fixture
def start(fake_mpirun: str, tmp_path: Path):
    """Starts a coordinator process, always at one address; the last one is killed at the end."""
    started: list[subprocess.Popen[str]] = []
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    script = str(Path(__file__).parent / "serve_fake.py")

    def start() -> tuple[subprocess.Popen[str], str]:
        with (tmp_path / "errors").open("a") as errors:
            arguments = [fake_mpirun, address, "127.0.0.1:0", str(tmp_path / "state"), "4"]
            process = subprocess.Popen(
                [sys.executable, script, *arguments], stdout=subprocess.PIPE, stderr=errors, text=True
            )
        started.append(process)
        return process, address

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=CALL_SECONDS)


def test_no_job_is_lost_or_run_twice_by_a_coordinator_killed_at_random_instants(start, make_spec, tmp_path) -> None:
    draw = random.Random(SEED)
    process, address = start()
    submitter = Submitter(address, make_spec)
    submitter.start()
    for _ in range(KILLS):
        if draw.random() < STARTS_CUT_SHORT:
            time.sleep(draw.uniform(0, 0.6))
        else:
            assert process.stdout is not None
            assert process.stdout.readline(), (tmp_path / "errors").read_text()
            time.sleep(draw.uniform(0, LONGEST_LIFE_SECONDS))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=CALL_SECONDS)
        process, _ = start()
    assert process.stdout is not None
    assert process.stdout.readline(), (tmp_path / "errors").read_text()
    submitter.enough.set()
    submitter.join(END_SECONDS)
    assert not submitter.is_alive()
    assert submitter.fault is None, submitter.fault
    assert len(submitter.jobs) > KILLS / 2

    with grpc.insecure_channel(address) as channel:
        stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
        listed = stub.ListJobs(pb.ListJobsRequest(page_size=1000), timeout=CALL_SECONDS).jobs
        assert sorted(job.id for job in listed) == sorted(job_id for job_id, _ in submitter.jobs.values())
        for job_id, name in submitter.jobs.values():
            for event in stub.WatchJob(pb.WatchJobRequest(job_id=job_id), timeout=END_SECONDS):
                last = event
            check(last.job, name, tmp_path / "state" / "jobs" / job_id)
    assert "Traceback" not in (tmp_path / "errors").read_text()


def check(job: job_pb2.Job, name: str, folder: Path) -> None:
    """That the job came to its one end by legal moves, was run at most once and left nothing running."""
    expected = job_pb2.JOB_STATE_CANCELLED if name == "long" else job_pb2.JOB_STATE_SUCCEEDED
    assert job.state == expected, job
    states = [JobState(job_pb2.JobState.Name(change.state).removeprefix("JOB_STATE_")) for change in job.history]
    assert states[0] is JobState.QUEUED
    assert all(after in TRANSITIONS[before].values() for before, after in itertools.pairwise(states)), states
    lost = [change.reason for change in job.history if change.state == job_pb2.JOB_STATE_RESTARTING]
    assert set(lost) <= {"CoordinatorRestarted"}, job
    records = [path.read_text() for path in (folder / "logs").glob("attempt-?")]
    launched = [text for text in records if text != keeper.VOID]
    assert len(launched) <= 1, job
    if name != "long":
        assert (folder / "logs" / "counted").read_text().splitlines() == ["begun", "ended"], job
    for text in launched:
        pid, start_ticks = map(int, text.splitlines()[0].split())
        stat = keeper.read_stat(pid)
        assert stat is None or stat.start_ticks != start_ticks or stat.state in "ZX", job
    assert not any(f"PACELINE_JOB_ID={job.id}".encode() in variables for variables in environments()), job


def environments() -> list[bytes]:
    """Of every living process here."""
    found = []
    for name in os.listdir("/proc"):
        try:
            found.append(Path("/proc", name, "environ").read_bytes() if name.isdigit() else b"")
        except OSError:
            continue  # it ended while we looked, or is another user's
    return found
