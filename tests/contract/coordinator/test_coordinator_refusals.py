"""What the service says no to: status, reason, field violations, remedy."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from coordinator.answers import STREAMS_AT_MOST
from protos import coordinator_pb2 as pb
from protos import job_pb2

DEADLINE_SECONDS = 10


@pytest.fixture
def refused() -> Callable[..., object]:
    """Expects a refusal; afterwards holds its message, reason and field violations."""

    @contextmanager
    def expect(code: grpc.StatusCode, reason: str) -> Iterator[SimpleNamespace]:
        found = SimpleNamespace(message="", fields=[])
        with pytest.raises(grpc.RpcError) as error:
            yield found
        status = rpc_status.from_call(error.value)
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        for detail in status.details:
            detail.Unpack(info)
            detail.Unpack(bad)
        found.message = status.message
        found.fields = [(violation.field, violation.description) for violation in bad.field_violations]
        assert (error.value.code(), info.reason, info.domain) == (code, reason, "paceline"), status

    return expect


def test_a_bad_job_file_names_every_fault_at_its_place(talk, refused) -> None:
    spec = talk.spec("good", workers=5)
    spec.optimizer.sgd.learning_rate = -1
    spec.model[0].dense.units = 0
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "InvalidJob") as no:
        talk.stub.SubmitJob(pb.SubmitJobRequest(spec=spec), timeout=DEADLINE_SECONDS)
    assert dict(no.fields) == {
        "model[0].dense.units": "0 is not at least 1",
        "optimizer.sgd.learning_rate": "-1 is not above 0",
        "workers": "5 is more than this coordinator's 2 slots; start it with --slots 5 or ask for 2 at most",
    }
    assert len(no.message.splitlines()) == 3
    assert not talk.stub.ListJobs(pb.ListJobsRequest(), timeout=DEADLINE_SECONDS).jobs


def test_an_empty_request_is_a_bad_job_and_no_crash(talk, refused) -> None:
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "InvalidJob") as no:
        talk.stub.SubmitJob(pb.SubmitJobRequest(), timeout=DEADLINE_SECONDS)
    assert {"data", "model", "loss", "optimizer"} <= {field.partition(".")[0] for field, _ in no.fields}


def test_data_outside_the_allowed_roots_is_refused(serve_with, refused, tmp_path) -> None:
    talk = serve_with(data_roots=(tmp_path,))
    spec = talk.spec("good")
    spec.data.train.npz.path = "/etc/passwd"
    with refused(grpc.StatusCode.PERMISSION_DENIED, "DataNotAllowed") as no:
        talk.stub.SubmitJob(pb.SubmitJobRequest(spec=spec), timeout=DEADLINE_SECONDS)
    ((field, description),) = no.fields
    assert field == "data.train.npz.path"
    assert str(tmp_path) in description
    spec.optimizer.sgd.learning_rate = -1  # with a fault of its own the job is a bad one
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "InvalidJob") as no:
        talk.stub.SubmitJob(pb.SubmitJobRequest(spec=spec), timeout=DEADLINE_SECONDS)
    assert [field for field, _ in no.fields] == ["optimizer.sgd.learning_rate", "data.train.npz.path"]


def test_checking_only_stores_nothing_and_shows_the_defaults(talk) -> None:
    job = talk.submit("good", validate_only=True)
    assert job.id == ""
    assert job.spec.training.batch_size == 32
    assert not talk.stub.ListJobs(pb.ListJobsRequest(), timeout=DEADLINE_SECONDS).jobs


def test_a_submit_sent_twice_makes_one_job(talk, refused) -> None:
    first = talk.submit("good", request_id="once")
    assert talk.submit("good", request_id="once").id == first.id
    with refused(grpc.StatusCode.ALREADY_EXISTS, "RequestIdReused") as no:
        talk.submit("short", request_id="once")
    assert first.id in no.message
    assert len(talk.stub.ListJobs(pb.ListJobsRequest(), timeout=DEADLINE_SECONDS).jobs) == 1


def test_a_request_id_too_long_to_keep_is_refused(talk, refused) -> None:
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "InvalidRequest"):
        talk.submit("good", request_id="x" * 129)


@pytest.mark.parametrize(
    ("method", "request_type"),
    [
        ("GetJob", pb.GetJobRequest),
        ("CancelJob", pb.CancelJobRequest),
        ("GetMetrics", pb.GetMetricsRequest),
        ("WatchJob", pb.WatchJobRequest),
        ("StreamLogs", pb.StreamLogsRequest),
        ("PullArtifacts", pb.PullArtifactsRequest),
    ],
)
@pytest.mark.parametrize("job_id", ["nobody-000000", "", "../../etc"])
def test_an_unknown_job_is_not_found_by_any_verb(talk, refused, method, request_type, job_id) -> None:
    with refused(grpc.StatusCode.NOT_FOUND, "JobNotFound") as no:
        answer = getattr(talk.stub, method)(request_type(job_id=job_id), timeout=DEADLINE_SECONDS)
        list(answer) if isinstance(answer, Iterator) else None
    assert "paceline list" in no.message


def test_an_ended_job_cannot_be_cancelled(talk, refused) -> None:
    job_id = talk.until_ended(talk.submit("short").id).id
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "JobEnded") as no:
        talk.cancel(job_id)
    assert "is SUCCEEDED" in no.message


def test_output_is_pulled_only_after_the_end_and_only_where_there_is_some(talk, refused) -> None:
    job_id = talk.submit("long", workers=2).id
    talk.until_state(job_id, job_pb2.JOB_STATE_RUNNING)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "JobNotEnded"):
        list(talk.stub.PullArtifacts(pb.PullArtifactsRequest(job_id=job_id), timeout=DEADLINE_SECONDS))
    talk.cancel(job_id)
    talk.until_ended(job_id)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "NoOutput"):
        list(talk.stub.PullArtifacts(pb.PullArtifactsRequest(job_id=job_id), timeout=DEADLINE_SECONDS))


def test_a_rank_the_job_does_not_have_has_no_log(talk, refused) -> None:
    job_id = talk.submit("short").id
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "NoSuchRank"):
        list(talk.stub.StreamLogs(pb.StreamLogsRequest(job_id=job_id, rank=1), timeout=DEADLINE_SECONDS))


@pytest.mark.parametrize("request_", [pb.ListJobsRequest(page_size=-1), pb.ListJobsRequest(page_token="x")])
def test_a_bad_page_is_refused(talk, refused, request_) -> None:
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "InvalidRequest"):
        talk.stub.ListJobs(request_, timeout=DEADLINE_SECONDS)


def test_a_report_needs_the_token_of_its_own_live_job(talk, refused) -> None:
    job_id = talk.submit("long").id
    talk.until_state(job_id, job_pb2.JOB_STATE_RUNNING)
    report = pb.ReportProgressRequest(job_id=job_id, attempt=1, reports=[job_pb2.Report(step=99)])

    def send(*metadata: tuple[str, str]) -> None:
        talk.stub.ReportProgress(report, metadata=metadata, timeout=DEADLINE_SECONDS)

    with refused(grpc.StatusCode.UNAUTHENTICATED, "TokenMissing"):
        send()
    with refused(grpc.StatusCode.UNAUTHENTICATED, "TokenMissing"):
        send(("authorization", "Basic abc"))
    with refused(grpc.StatusCode.PERMISSION_DENIED, "TokenRefused"):
        send(("authorization", "Bearer guessed"))
    report.job_id = "nobody-000000"  # nobody learns by guessing which jobs there are
    with refused(grpc.StatusCode.PERMISSION_DENIED, "TokenRefused"):
        send(("authorization", "Bearer guessed"))
    assert talk.get(job_id).progress.step == 1


def test_a_live_token_reports_for_its_attempt_and_ranks_alone_and_dies_with_its_job(talk, refused, token_of) -> None:
    job_id = talk.submit("long").id
    running = talk.until_state(job_id, job_pb2.JOB_STATE_RUNNING)
    token = (("authorization", f"Bearer {token_of(job_id)}"),)

    def send(attempt: int = running.attempt, rank: int = 0) -> None:
        report = pb.ReportProgressRequest(job_id=job_id, attempt=attempt, ranks=[pb.RankReport(rank=rank)])
        talk.stub.ReportProgress(report, metadata=token, timeout=DEADLINE_SECONDS)

    send()
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "AttemptOver"):
        send(attempt=2)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "NoSuchRank"):
        send(rank=1)
    talk.cancel(job_id)
    talk.until_ended(job_id)
    with refused(grpc.StatusCode.PERMISSION_DENIED, "TokenRefused"):
        send()


def test_streams_beyond_the_limit_are_refused_and_short_calls_go_on(talk, refused) -> None:
    job_id = talk.submit("long").id
    watches = [
        talk.stub.WatchJob(pb.WatchJobRequest(job_id=job_id), timeout=DEADLINE_SECONDS) for _ in range(STREAMS_AT_MOST)
    ]
    for watch in watches:
        next(watch)
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "TooManyStreams"):
        list(talk.stub.WatchJob(pb.WatchJobRequest(job_id=job_id), timeout=DEADLINE_SECONDS))
    assert talk.get(job_id).id == job_id
    for watch in watches:
        watch.cancel()
    talk.until_state(job_id, job_pb2.JOB_STATE_RUNNING)  # their places are free again
