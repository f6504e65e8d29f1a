"""A real coordinator on loopback with a fake launcher behind it, and the words to talk to it."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest
import sqlalchemy as sa

from coordinator.addresses import Address
from coordinator.database import read_store
from coordinator.serve import Coordinator, Settings, running
from protos import coordinator_pb2 as pb
from protos import coordinator_pb2_grpc, job_pb2
from protos.job_file import parse_job

DEADLINE_SECONDS = 20
ENDED = {job_pb2.JOB_STATE_CANCELLED, job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED}
JOB = """
name: {name}
data: {{train: {{built_in: digits}}}}
model: [{{dense: {{units: 10}}}}]
loss: softmax_cross_entropy
optimizer: sgd
workers: {workers}
limits: {{retries: {retries}}}
"""


def spec_of(name: str, workers: int = 1, retries: int = 0) -> job_pb2.JobSpec:
    """A job the fake launcher treats as its name asks."""
    return parse_job(JOB.format(name=name, workers=workers, retries=retries))


class Talk(NamedTuple):
    """A coordinator and a stub of its service."""

    coordinator: Coordinator
    stub: coordinator_pb2_grpc.CoordinatorServiceStub

    def spec(self, name: str, workers: int = 1, retries: int = 0) -> job_pb2.JobSpec:
        return spec_of(name, workers, retries)

    def submit(self, name: str, workers: int = 1, retries: int = 0, **options: object) -> job_pb2.Job:
        request = pb.SubmitJobRequest(spec=self.spec(name, workers, retries), **options)
        return self.stub.SubmitJob(request, timeout=DEADLINE_SECONDS).job

    def get(self, job_id: str) -> job_pb2.Job:
        return self.stub.GetJob(pb.GetJobRequest(job_id=job_id), timeout=DEADLINE_SECONDS).job

    def cancel(self, job_id: str) -> job_pb2.Job:
        return self.stub.CancelJob(pb.CancelJobRequest(job_id=job_id), timeout=DEADLINE_SECONDS).job

    def until(self, job_id: str, wanted: Callable[[job_pb2.Job], bool]) -> job_pb2.Job:
        """The first snapshot of a watch that is as wanted."""
        watch = self.stub.WatchJob(pb.WatchJobRequest(job_id=job_id), timeout=DEADLINE_SECONDS)
        for event in watch:
            if event.HasField("job") and wanted(event.job):
                watch.cancel()
                return event.job
        raise AssertionError(f"the watch of {job_id} ended first: {self.get(job_id)}")

    def until_state(self, job_id: str, state: job_pb2.JobState) -> job_pb2.Job:
        return self.until(job_id, lambda job: job.state == state)

    def until_gone(self, path: Path) -> None:
        """Something is removed that no watch tells of."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while path.exists():
            assert time.monotonic() < deadline, f"{path} is still there"
            time.sleep(0.02)

    def until_ended(self, job_id: str) -> job_pb2.Job:
        return self.until(job_id, lambda job: job.state in ENDED)


@pytest.fixture
def make_spec() -> Callable[..., job_pb2.JobSpec]:
    return spec_of


@pytest.fixture(scope="session")
def fake_mpirun(tmp_path_factory: pytest.TempPathFactory) -> str:
    script = tmp_path_factory.mktemp("fake") / "mpirun"
    program = Path(__file__).parent / "fake_mpirun.py"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{program}" "$@"\n')
    script.chmod(0o755)
    return str(script)


@pytest.fixture
def store(request: pytest.FixtureRequest) -> sa.URL | None:
    """SQLite, or what a module is parametrized with."""
    if getattr(request, "param", "sqlite") == "sqlite":
        return None
    return read_store(request.getfixturevalue("postgres").new_database())


@pytest.fixture
def settings(tmp_path: Path, fake_mpirun: str, store: sa.URL | None) -> Settings:
    free = Address("127.0.0.1", 0)
    return Settings(free, free, tmp_path / "state", (), 2, fake_mpirun, "paceline-worker", store, grace_seconds=1.0)


@pytest.fixture
def serve_with(settings: Settings) -> Iterator[Callable[..., Talk]]:
    """Starts a coordinator with some settings changed; it stops with the test."""
    with ExitStack() as stack:

        def start(**changed: object) -> Talk:
            coordinator = stack.enter_context(running(replace(settings, **changed)))
            channel = stack.enter_context(grpc.insecure_channel(str(coordinator.grpc_address)))
            return Talk(coordinator, coordinator_pb2_grpc.CoordinatorServiceStub(channel))

        yield start


@pytest.fixture
def talk(serve_with: Callable[..., Talk]) -> Talk:
    return serve_with()


def variables_of(job_id: str) -> dict[str, str] | None:
    """The environment of a job's process, once there is one."""
    for entry in Path("/proc").iterdir():
        try:
            variables = dict(pair.split("=", 1) for pair in (entry / "environ").read_text().split("\0") if "=" in pair)
        except (OSError, UnicodeDecodeError):
            continue
        if variables.get("PACELINE_JOB_ID") == job_id:
            return variables
    return None


@pytest.fixture
def environment_of() -> Callable[[str], dict[str, str] | None]:
    return variables_of


@pytest.fixture
def token_of() -> Callable[[str], str]:
    """The token of a job's process."""

    def found(job_id: str) -> str:
        variables = variables_of(job_id)
        assert variables is not None, f"no process of {job_id}"
        return variables["PACELINE_JOB_TOKEN"]

    return found
