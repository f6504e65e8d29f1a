"""Jobs and times made up for tests."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from coordinator.jobs import Job, JobState, StateChange
from protos import job_pb2

NOON = datetime(2026, 1, 2, 12, 0, 0, 123456, tzinfo=UTC)


@pytest.fixture(scope="session")
def noon() -> datetime:
    return NOON


@pytest.fixture(scope="session")
def make_job() -> Callable[..., Job]:
    def make(job_id: str = "digits-000000", state: JobState = JobState.QUEUED, workers: int = 1, **fields: object) -> Job:
        change = StateChange(state, "Made", "made for a test", NOON)
        job = Job(job_id, job_pb2.JobSpec(name="digits", workers=workers), (change,), change.reason, change.message)
        return replace(job, **fields)

    return make
