"""A coordinator whose jobs are in PostgreSQL, and what a restart of that server does to it."""

import re
import urllib.error
import urllib.request
from dataclasses import replace

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from coordinator.database import read_store
from coordinator.serve import CannotServe, running
from protos import coordinator_pb2 as pb
from protos import job_pb2


def http(talk, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{talk.coordinator.http.port}{path}", timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_while_the_server_is_away_calls_say_so_and_afterwards_every_job_goes_on(serve_with, postgres) -> None:
    talk = serve_with(store=read_store(postgres.new_database()))
    running_id = talk.submit("long", workers=2).id
    talk.until_state(running_id, job_pb2.JOB_STATE_RUNNING)
    waiting_id = talk.submit("good").id
    postgres.stop()
    try:
        for call, request in (
            (talk.stub.SubmitJob, pb.SubmitJobRequest(spec=talk.spec("good"))),
            (talk.stub.GetJob, pb.GetJobRequest(job_id=running_id)),
            (talk.stub.ListJobs, pb.ListJobsRequest()),
            (talk.stub.CancelJob, pb.CancelJobRequest(job_id=running_id)),
        ):
            with pytest.raises(grpc.RpcError) as error:
                call(request, timeout=60)
            assert error.value.code() == grpc.StatusCode.UNAVAILABLE
            status = rpc_status.from_call(error.value)
            info = error_details_pb2.ErrorInfo()
            assert status.details[0].Unpack(info)
            assert info.reason == "StoreUnavailable"
            said = r"the job store postgresql://.* cannot be used now: .*; ask again when it is back"
            assert re.fullmatch(said, status.message)
        code, metrics = http(talk, "/metrics")
        assert code == 200
        assert "paceline_slots" in metrics
    finally:
        postgres.start()
    talk.cancel(running_id)
    assert talk.until_ended(running_id).state == job_pb2.JOB_STATE_CANCELLED
    assert talk.until_ended(waiting_id).state == job_pb2.JOB_STATE_SUCCEEDED
    listed = talk.stub.ListJobs(pb.ListJobsRequest(), timeout=20).jobs
    assert [job.id for job in listed] == [waiting_id, running_id]


def test_two_coordinators_with_folders_of_their_own_do_not_share_a_database(settings, postgres, tmp_path) -> None:
    store = read_store(postgres.new_database())
    second = replace(settings, store=store, state=tmp_path / "second")
    refused = r"another coordinator \(paceline on .*\) uses postgresql://.*: stop it, or give this one another --store"
    with running(replace(settings, store=store)):
        with pytest.raises(CannotServe, match=refused), running(second):
            pass
        assert not (tmp_path / "second").exists()
    with running(second):
        pass
