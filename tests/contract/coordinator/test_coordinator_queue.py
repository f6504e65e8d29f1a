"""Priorities, limits, filters and times, over real gRPC."""

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from coordinator.folders import job_folder
from coordinator.quotas import Quotas
from protos import coordinator_pb2 as pb
from protos import job_pb2


def submit(talk, name: str, **fields: object) -> job_pb2.Job:
    spec = talk.spec(name)
    spec.MergeFrom(job_pb2.JobSpec(**fields))
    return talk.stub.SubmitJob(pb.SubmitJobRequest(spec=spec), timeout=20).job


def listed(talk, **request: object) -> list[str]:
    return [job.spec.name for job in talk.stub.ListJobs(pb.ListJobsRequest(**request), timeout=20).jobs]


def refusal(call) -> tuple[grpc.StatusCode, str, dict[str, object]]:
    """Code, message and the details by the name of their message."""
    with pytest.raises(grpc.RpcError) as error:
        call()
    status = rpc_status.from_call(error.value)
    details = {}
    for detail in status.details:
        kind = detail.TypeName().rpartition(".")[2]
        details[kind] = getattr(error_details_pb2, kind)()
        assert detail.Unpack(details[kind])
    return error.value.code(), status.message, details


def test_of_waiting_jobs_the_one_of_higher_priority_starts_first_and_each_knows_its_place(talk) -> None:
    first = submit(talk, "long", workers=2)
    talk.until_state(first.id, job_pb2.JOB_STATE_RUNNING)
    low = submit(talk, "good", priority=-1)
    high = submit(talk, "good", priority=5, workers=2)
    assert talk.until(high.id, lambda job: job.queue_position == 1).message == "needs 2 slots, 0 free"
    waiting = talk.until(low.id, lambda job: job.queue_position == 2)
    assert (waiting.reason, waiting.message) == ("WaitingForTurn", "needs 1 slot, 0 free; 1 job ahead")
    talk.cancel(first.id)
    ended = [talk.until_ended(job.id) for job in (low, high)]
    started = {
        job.id: change.time.ToNanoseconds()
        for job in ended
        for change in job.history
        if change.state == job_pb2.JOB_STATE_STARTING
    }
    assert started[high.id] < started[low.id]


def test_a_full_queue_refuses_with_the_limit_and_a_repeated_submit_still_gets_its_job(serve_with) -> None:
    talk = serve_with(quotas=Quotas(queue=1))
    running = talk.submit("long", workers=2)
    talk.until_state(running.id, job_pb2.JOB_STATE_RUNNING)
    waiting = talk.submit("good", request_id="once")
    code, message, details = refusal(lambda: talk.submit("good"))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert message == (
        "1 wait, and the limit is queue=1 (jobs that wait, of everybody): submit it later, or cancel one that waits"
    )
    assert details["ErrorInfo"].reason == "LimitExceeded"
    (violation,) = details["QuotaFailure"].violations
    assert (violation.subject, violation.description) == ("queue", message)
    assert talk.submit("good", request_id="once").id == waiting.id
    talk.cancel(waiting.id)
    assert talk.submit("good").id != waiting.id


def test_a_job_beyond_what_a_job_may_take_is_refused_also_when_it_is_only_checked(serve_with) -> None:
    talk = serve_with(quotas=Quotas(job_slots=1))
    for validate_only in (False, True):
        code, message, _ = refusal(lambda only=validate_only: talk.submit("good", workers=2, validate_only=only))
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert message == "this job takes 2, and the limit is job.slots=1 (slots a job takes): ask for fewer workers"
    assert listed(talk) == []


def test_a_user_at_the_limit_of_running_jobs_waits_for_one_to_end(serve_with) -> None:
    talk = serve_with(quotas=Quotas(user_running=1))
    first, second = talk.submit("long"), talk.submit("good")
    waiting = talk.until(second.id, lambda job: job.reason == "UserRunningLimit")
    assert (waiting.state, waiting.queue_position) == (job_pb2.JOB_STATE_QUEUED, 1)
    talk.cancel(first.id)
    assert talk.until_ended(second.id).state == job_pb2.JOB_STATE_SUCCEEDED


def test_lists_are_filtered_and_pages_stay_as_they_are_while_jobs_are_added(talk) -> None:
    for number in range(4):
        submit(talk, f"job-{number}", workers=2, labels={"team": "vision" if number % 2 else "speech"}, priority=number)
    assert listed(talk, filter="labels.team=vision") == ["job-3", "job-1"]
    assert listed(talk, filter="labels.team=vision AND priority<2") == ["job-1"]
    assert listed(talk, filter="owner=nobody") == []
    first = talk.stub.ListJobs(pb.ListJobsRequest(filter="labels.team=vision", page_size=1), timeout=20)
    submit(talk, "job-5", labels={"team": "vision"})
    rest = {"page_token": first.next_page_token, "page_size": 5}
    assert listed(talk, filter="labels.team=vision", **rest) == ["job-1"]
    for request, fault in (
        ({"filter": "labels.team=speech", **rest}, "page_token: it was given for another filter"),
        ({"filter": "state=GONE"}, "filter: state 'GONE' is not one of"),
    ):
        code, message, _ = refusal(lambda request=request: listed(talk, **request))
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert message.startswith(fault)


def test_a_job_that_runs_for_too_long_is_stopped_and_says_so(talk) -> None:
    job = talk.until_ended(submit(talk, "long", limits=job_pb2.Limits(seconds=1)).id)
    assert (job.state, job.reason) == (job_pb2.JOB_STATE_FAILED, "DeadlineExceeded")
    assert job.message == "stopped: it ran for longer than limits.seconds allows, 1 s; what it left can be pulled"
    launched, ended = job.history[1].time.ToNanoseconds(), job.history[-1].time.ToNanoseconds()
    assert ended - launched > 1e9


def test_files_and_series_of_a_job_go_when_its_time_is_over_and_the_job_stays(talk) -> None:
    ended = talk.until_ended(submit(talk, "good", limits=job_pb2.Limits(keep_for=0.2)).id)
    kept = talk.until_ended(talk.submit("good").id)
    state = talk.coordinator.settings.state
    talk.until_gone(job_folder(state, ended.id).path)
    code, message, details = refusal(
        lambda: list(talk.stub.PullArtifacts(pb.PullArtifactsRequest(job_id=ended.id), timeout=20))
    )
    assert (code, details["ErrorInfo"].reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NoOutput")
    assert message == f"the files of job {ended.id} are removed: they were kept for 0.2 s (limits.keep_for)"
    assert talk.get(ended.id) == ended
    assert job_folder(state, kept.id).output.is_dir()
    jobs_with_series = {
        sample.labels["job"]
        for metric in talk.coordinator.registry.collect()
        for sample in metric.samples
        if "job" in sample.labels
    }
    assert ended.id not in jobs_with_series
    assert kept.id in jobs_with_series
