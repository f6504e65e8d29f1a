"""What becomes of a job, from submission to its end, over real gRPC and real processes."""

from protos import coordinator_pb2 as pb
from protos import job_pb2


def test_a_job_that_trains_succeeds_with_its_summary_and_every_state_on_record(talk) -> None:
    job = talk.until_ended(talk.submit("good", workers=2).id)
    assert job.state == job_pb2.JOB_STATE_SUCCEEDED, job.message
    assert [job_pb2.JobState.Name(change.state) for change in job.history] == [
        "JOB_STATE_QUEUED",
        "JOB_STATE_STARTING",
        "JOB_STATE_RUNNING",
        "JOB_STATE_SUCCEEDED",
    ]
    assert (job.summary.steps, job.summary.world_size, job.summary.validation_accuracy) == (4, 2, 0.75)
    assert (job.attempt, job.queue_position, job.progress.step) == (1, 0, 4)
    times = [change.time.ToNanoseconds() for change in job.history]
    assert times == sorted(times)
    assert job.create_time == job.history[0].time
    assert job.state_time == job.history[-1].time
