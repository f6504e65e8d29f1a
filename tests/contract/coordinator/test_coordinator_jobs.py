"""What becomes of a job, from submission to its end, over real gRPC and real processes."""

import pytest

from protos import coordinator_pb2 as pb
from protos import job_pb2

pytestmark = pytest.mark.parametrize("store", ["sqlite", "postgres"], indirect=True)


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


def test_a_job_too_short_to_report_still_succeeds(talk) -> None:
    job = talk.until_ended(talk.submit("short").id)
    assert job.state == job_pb2.JOB_STATE_SUCCEEDED, job.message
    assert not job.HasField("progress")


def test_a_rank_that_fails_gives_the_job_its_message_and_its_last_lines(talk) -> None:
    job = talk.until_ended(talk.submit("broken").id)
    assert (job.state, job.reason) == (job_pb2.JOB_STATE_FAILED, "RankFailed")
    message, _, last_lines = job.message.partition("\nlast log lines:\n")
    assert message == "rank 0 of 1 on here: the loss is nan at step 2"
    assert last_lines.splitlines() == ["  training begins"]
    assert not job.HasField("summary")


def test_a_launcher_killed_by_a_signal_fails_the_job_naming_it(talk) -> None:
    job = talk.until_ended(talk.submit("killed").id)
    assert job.state == job_pb2.JOB_STATE_FAILED
    assert "signal 9 (SIGKILL)" in job.message


def test_exit_code_0_without_a_summary_is_a_failure(talk) -> None:
    job = talk.until_ended(talk.submit("hollow").id)
    assert (job.state, job.reason) == (job_pb2.JOB_STATE_FAILED, "NoSummary")
    assert "left no summary.json" in job.message


def test_a_launcher_that_is_not_there_fails_the_job(serve_with) -> None:
    talk = serve_with(mpirun="/nowhere/mpirun")
    job = talk.until_ended(talk.submit("good").id)
    assert (job.state, job.reason) == (job_pb2.JOB_STATE_FAILED, "LaunchFailed")
    assert "/nowhere/mpirun" in job.message


def test_a_job_that_never_reports_fails_at_its_start_deadline(serve_with) -> None:
    talk = serve_with(start_deadline_seconds=0.3)
    job = talk.until_ended(talk.submit("silent").id)
    assert (job.state, job.reason) == (job_pb2.JOB_STATE_FAILED, "StartDeadlineExceeded")
    assert "no rank reported within 0.3 s" in job.message


def test_a_running_job_is_cancelled_and_its_slots_go_to_the_next(talk) -> None:
    first, second = talk.submit("long", workers=2), talk.submit("good", workers=2)
    talk.until_state(first.id, job_pb2.JOB_STATE_RUNNING)
    waiting = talk.until(second.id, lambda job: job.reason == "WaitingForSlots")
    assert (waiting.message, waiting.queue_position) == ("needs 2 slots, 0 free", 1)
    assert talk.cancel(first.id).state == job_pb2.JOB_STATE_CANCELLING
    ended = talk.until_ended(first.id)
    assert (ended.state, ended.reason) == (job_pb2.JOB_STATE_CANCELLED, "CancelRequested")
    assert talk.until_ended(second.id).state == job_pb2.JOB_STATE_SUCCEEDED


def test_a_job_that_ignores_the_kind_signal_is_cancelled_all_the_same(serve_with) -> None:
    talk = serve_with(grace_seconds=0.2)
    job_id = talk.submit("stubborn").id
    talk.until_state(job_id, job_pb2.JOB_STATE_RUNNING)
    talk.cancel(job_id)
    talk.cancel(job_id)  # asking twice is no fault
    assert talk.until_ended(job_id).state == job_pb2.JOB_STATE_CANCELLED


def test_a_queued_job_is_cancelled_before_it_starts(talk) -> None:
    first, second, third = (talk.submit("long", workers=2) for _ in range(3))
    talk.until(third.id, lambda job: job.message == "needs 2 slots, 0 free; 1 job ahead")
    assert talk.cancel(second.id).state == job_pb2.JOB_STATE_CANCELLED
    talk.until(third.id, lambda job: job.message == "needs 2 slots, 0 free")
    assert talk.get(second.id).attempt == 0
    assert talk.get(first.id).attempt == 1


def test_jobs_that_fit_run_side_by_side(talk) -> None:
    first, second = talk.submit("long"), talk.submit("long")
    for job in (first, second):
        talk.until_state(job.id, job_pb2.JOB_STATE_RUNNING)
    assert talk.get(first.id).state == job_pb2.JOB_STATE_RUNNING


def test_the_list_is_newest_first_in_pages_without_history(talk) -> None:
    ids = [talk.submit("short").id for _ in range(3)]
    for job_id in ids:
        talk.until_ended(job_id)
    first = talk.stub.ListJobs(pb.ListJobsRequest(page_size=2), timeout=10)
    second = talk.stub.ListJobs(pb.ListJobsRequest(page_size=2, page_token=first.next_page_token), timeout=10)
    assert [job.id for job in (*first.jobs, *second.jobs)] == ids[::-1]
    assert second.next_page_token == ""
    assert all(not job.history and job.summary.steps == 4 for job in first.jobs)
