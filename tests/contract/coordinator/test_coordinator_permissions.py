"""Who may do what, held against a real coordinator: every role, every call, one's own job and another's."""

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from coordinator.permissions import RULES
from coordinator.tokens import Role
from protos import coordinator_pb2 as pb
from protos import job_pb2

DEADLINE_SECONDS = 20
OK = ("OK", "")
ROLE = ("PERMISSION_DENIED", "RoleNotAllowed")
NO_JOB = ("NOT_FOUND", "JobNotFound")
NO_TOKEN = ("UNAUTHENTICATED", "TokenMissing")
BAD_TOKEN = ("UNAUTHENTICATED", "TokenNotGood")
NOT_A_JOBS = ("PERMISSION_DENIED", "TokenRefused")
ENDED = ("FAILED_PRECONDITION", "JobEnded")

ABOUT_A_JOB = {
    "GetJob": pb.GetJobRequest,
    "WatchJob": pb.WatchJobRequest,
    "StreamLogs": pb.StreamLogsRequest,
    "GetMetrics": pb.GetMetricsRequest,
    "PullArtifacts": pb.PullArtifactsRequest,
    "CancelJob": pb.CancelJobRequest,
    "PauseJob": pb.PauseJobRequest,
    "ResumeJob": pb.ResumeJobRequest,
    "ReportProgress": pb.ReportProgressRequest,
}
# For each caller: seeing ada's job, which has ended; cancelling, pausing, resuming it; submitting; reporting to it.
# JobEnded is what a caller gets that may cancel, pause or resume.
OUTCOMES = {
    "ada": (OK, ENDED, OK, NOT_A_JOBS),
    "bob": (NO_JOB, NO_JOB, OK, NOT_A_JOBS),
    "viewer": (OK, ROLE, ROLE, NOT_A_JOBS),
    "root": (OK, ENDED, OK, NOT_A_JOBS),
    "nobody": (NO_TOKEN, NO_TOKEN, NO_TOKEN, NO_TOKEN),
    "guesser": (BAD_TOKEN, BAD_TOKEN, BAD_TOKEN, NOT_A_JOBS),
    "revoked": (BAD_TOKEN, BAD_TOKEN, BAD_TOKEN, NOT_A_JOBS),
    "expired": (BAD_TOKEN, BAD_TOKEN, BAD_TOKEN, NOT_A_JOBS),
}
ROLES = {"ada": Role.SUBMITTER, "bob": Role.SUBMITTER, "viewer": Role.VIEWER, "root": Role.ADMINISTRATOR}


def outcome(call) -> tuple[str, str]:
    """The code and reason of a call, a stream read to its end."""
    try:
        answer = call()
        if isinstance(answer, Iterator):
            list(answer)
    except grpc.RpcError as error:
        info = error_details_pb2.ErrorInfo()
        for detail in rpc_status.from_call(error).details:
            detail.Unpack(info)
        return error.code().name, info.reason
    return OK


@pytest.fixture
def world(serve_with) -> SimpleNamespace:
    """A coordinator with a token for each caller, and a job of ada's that has ended."""
    talk = serve_with()
    now = datetime.now(UTC)
    tokens = talk.coordinator.tokens
    secrets = {name: tokens.create(name, role, None, now) for name, role in ROLES.items()}
    secrets["revoked"] = tokens.create("revoked", Role.ADMINISTRATOR, None, now)
    tokens.revoke("revoked", now)
    secrets["expired"] = tokens.create("expired", Role.ADMINISTRATOR, now, now - timedelta(hours=1))
    secrets["guesser"] = "guessed"
    headers = {name: (("authorization", f"Bearer {secret}"),) for name, secret in secrets.items()}
    headers["nobody"] = ()

    def call(who: str, name: str, request: object, **options: object):
        return getattr(talk.stub, name)(request, timeout=DEADLINE_SECONDS, metadata=headers[who], **options)

    deadline = time.monotonic() + DEADLINE_SECONDS
    while outcome(lambda: call("nobody", "ListJobs", pb.ListJobsRequest())) != NO_TOKEN:
        assert time.monotonic() < deadline  # the tokens count within a second
        time.sleep(0.05)
    job = call("ada", "SubmitJob", pb.SubmitJobRequest(spec=talk.spec("good"))).job
    list(call("ada", "WatchJob", pb.WatchJobRequest(job_id=job.id)))
    return SimpleNamespace(talk=talk, call=call, job=job, secrets=secrets, headers=headers)


def test_every_call_has_a_row_and_every_row_of_a_job_is_tried_here() -> None:
    calls = {method.name for method in pb.DESCRIPTOR.services_by_name["CoordinatorService"].methods}
    assert calls <= set(RULES)
    assert calls - {"SubmitJob", "ListJobs"} == set(ABOUT_A_JOB)


def test_the_whole_matrix(world) -> None:
    """Callers by calls, of a job that is ada's and of one that is not there, which answer alike to who may not see."""
    wrong = []
    for who, (seeing, cancelling, submitting, reporting) in OUTCOMES.items():
        for name, request in ABOUT_A_JOB.items():
            changing = dict.fromkeys(("CancelJob", "PauseJob", "ResumeJob"), cancelling)
            wanted = {**changing, "ReportProgress": reporting}.get(name, seeing)
            found = outcome(lambda: world.call(who, name, request(job_id=world.job.id)))  # noqa: B023
            wrong += [(who, name, found, wanted)] if found != wanted else []
            absent = outcome(lambda: world.call(who, name, request(job_id="nobody-000000")))  # noqa: B023
            hidden = NO_JOB if wanted in (OK, ENDED) else wanted
            wrong += [(who, name, "absent", absent, hidden)] if absent != hidden else []
        request = pb.SubmitJobRequest(spec=world.talk.spec("short"), validate_only=True)
        found = outcome(lambda: world.call(who, "SubmitJob", request))  # noqa: B023
        wrong += [(who, "SubmitJob", found, submitting)] if found != submitting else []
    assert wrong == []


def test_a_list_holds_ones_own_jobs_and_whoever_sees_all_gets_all(world) -> None:
    theirs = world.call("bob", "SubmitJob", pb.SubmitJobRequest(spec=world.talk.spec("short"))).job

    def listed(who: str, text: str = "") -> set[str]:
        return {job.id for job in world.call(who, "ListJobs", pb.ListJobsRequest(filter=text)).jobs}

    assert listed("ada") == {world.job.id}
    assert listed("bob") == {theirs.id}
    assert listed("bob", 'owner="ada"') == set()
    assert listed("viewer") == listed("root") == {world.job.id, theirs.id}
    assert (world.job.owner, theirs.owner) == ("ada", "bob")


def test_a_refusal_for_anothers_job_has_the_words_of_one_that_does_not_exist(world) -> None:
    def words(job_id: str) -> str:
        with pytest.raises(grpc.RpcError) as error:
            world.call("bob", "GetJob", pb.GetJobRequest(job_id=job_id))
        return error.value.details().replace(job_id, "ID")

    assert words(world.job.id) == words("good-000000")


def test_nobody_is_given_anothers_job_for_repeating_its_request_id(world) -> None:
    request = pb.SubmitJobRequest(spec=world.talk.spec("short"), request_id="once")
    first = world.call("ada", "SubmitJob", request).job
    assert world.call("ada", "SubmitJob", request).job.id == first.id
    second = world.call("bob", "SubmitJob", request).job
    assert (second.id != first.id, second.owner) == (True, "bob")


def test_a_workers_token_is_good_for_its_own_job_alone_and_dies_with_it(world, token_of) -> None:
    jobs = {}
    for who in ("ada", "bob"):
        jobs[who] = world.call(who, "SubmitJob", pb.SubmitJobRequest(spec=world.talk.spec("long"))).job.id
        for event in world.call(who, "WatchJob", pb.WatchJobRequest(job_id=jobs[who])):
            if event.job.state == job_pb2.JOB_STATE_RUNNING:
                break
    token = token_of(jobs["ada"])
    world.headers["worker"] = (("authorization", f"Bearer {token}"),)

    def report(job_id: str) -> tuple[str, str]:
        request = pb.ReportProgressRequest(job_id=job_id, attempt=1)
        return outcome(lambda: world.call("worker", "ReportProgress", request))

    assert report(jobs["ada"]) == OK
    assert report(jobs["bob"]) == NOT_A_JOBS
    for name in set(ABOUT_A_JOB) - {"ReportProgress"}:
        found = outcome(lambda: world.call("worker", name, ABOUT_A_JOB[name](job_id=jobs["ada"])))  # noqa: B023
        assert found == BAD_TOKEN, name
    assert outcome(lambda: world.call("worker", "ListJobs", pb.ListJobsRequest())) == BAD_TOKEN
    world.call("ada", "CancelJob", pb.CancelJobRequest(job_id=jobs["ada"]))
    list(world.call("ada", "WatchJob", pb.WatchJobRequest(job_id=jobs["ada"])))
    assert report(jobs["ada"]) == NOT_A_JOBS  # replayed


def test_a_stream_ends_when_its_callers_token_is_revoked(world) -> None:
    request = pb.SubmitJobRequest(spec=world.talk.spec("chatty"))
    job_id = world.call("ada", "SubmitJob", request).job.id
    stream = world.call("ada", "StreamLogs", pb.StreamLogsRequest(job_id=job_id, follow=True))
    next(stream)
    world.talk.coordinator.tokens.revoke("ada", datetime.now(UTC))
    assert outcome(lambda: stream) == BAD_TOKEN


def test_health_is_open_and_reflection_is_for_the_known(world) -> None:
    with grpc.insecure_channel(str(world.talk.coordinator.grpc_address)) as channel:
        asked = health_pb2.HealthCheckRequest()
        assert health_pb2_grpc.HealthStub(channel).Check(asked, timeout=DEADLINE_SECONDS).status == 1
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)

        def reflect(who: str) -> tuple[str, str]:
            asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            headers = world.headers[who]
            return outcome(lambda: stub.ServerReflectionInfo(asked, timeout=DEADLINE_SECONDS, metadata=headers))

        found = {who: reflect(who) for who in ("nobody", "guesser", "viewer", "bob", "root")}
    assert found == {"nobody": NO_TOKEN, "guesser": BAD_TOKEN, "viewer": OK, "bob": OK, "root": OK}


def test_the_audit_log_tells_deeds_and_refusals_and_no_secret(world) -> None:
    state = world.talk.coordinator.settings.state
    outcome(lambda: world.call("ada", "CancelJob", pb.CancelJobRequest(job_id=world.job.id)))
    outcome(lambda: world.call("viewer", "CancelJob", pb.CancelJobRequest(job_id=world.job.id)))
    outcome(lambda: world.call("bob", "GetJob", pb.GetJobRequest(job_id=world.job.id)))
    outcome(lambda: world.call("guesser", "GetJob", pb.GetJobRequest(job_id=world.job.id)))
    world.call("root", "GetJob", pb.GetJobRequest(job_id=world.job.id))  # looking is not written down
    known, unknown = ((state / name).read_text() for name in ("audit.jsonl", "audit-unknown.jsonl"))
    assert not any(secret in known + unknown for secret in world.secrets.values())
    lines = [json.loads(line) for line in known.splitlines()]
    told = [(line["who"], line["call"], line["job"], line["outcome"], line.get("reason")) for line in lines]
    job_id = world.job.id
    assert told == [
        ("ada", "SubmitJob", job_id, "OK", None),
        ("ada", "CancelJob", job_id, "FAILED_PRECONDITION", None),
        ("viewer", "CancelJob", job_id, "PERMISSION_DENIED", "RoleNotAllowed"),
        ("bob", "GetJob", job_id, "NOT_FOUND", "JobNotFound"),
    ]
    assert all(line["from"].startswith("ipv4:127.0.0.1:") for line in lines)
    last = json.loads(unknown.splitlines()[-1])
    assert (last["who"], last["call"], last["outcome"]) == (None, "GetJob", "UNAUTHENTICATED")
