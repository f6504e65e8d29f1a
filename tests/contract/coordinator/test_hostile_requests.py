"""What a caller that means harm, or does not know better, can do to a coordinator: nothing but be told no.

Each row is a request and its one outcome. All share a coordinator, which after each row answers and holds the jobs it
held before. What a worker can do to a parameter server is in tests/contract/test_hostile_workers.py; disks, clocks and
programs that fail a coordinator are in test_hostile_machine.py. Print the table of outcomes with

    python -m pytest tests/contract/coordinator -k hostile -rP -q | grep '^row'
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator

import grpc
import pytest

from protos import coordinator_pb2 as pb
from protos import job_pb2
from tests.contract.coordinator.hostile import (
    Deed,
    Outcome,
    World,
    call,
    http,
    of_ended,
    of_running,
    reads,
    reports,
    submit,
    token_of,
    world_in,
)

NAN, MOST_INT32, MOST_INT64 = math.nan, 2**31 - 1, 2**63 - 1
LARGE = bytes(5 << 20)


def setting(path: str, value: object) -> Deed:
    """Submit a job in which this field is that."""

    def change(spec: job_pb2.JobSpec) -> None:
        *parts, last = path.split(".")
        place = spec
        for part in parts:
            place = place[int(part)] if part.isdigit() else getattr(place, part)
        setattr(place, last, value)

    return submit(change)


def residuals(depth: int) -> Deed:
    def change(spec: job_pb2.JobSpec) -> None:
        layers = spec.model
        for _ in range(depth):
            layers = layers.add().residual.layers
        layers.add().relu.SetInParent()

    return submit(change)


def layers(count: int, word: str) -> Deed:
    def change(spec: job_pb2.JobSpec) -> None:
        for _ in range(count):
            layer = spec.model.add()
            if word:
                getattr(layer, word).SetInParent()

    return submit(change)


def metric(depth: int) -> job_pb2.Report:
    report = job_pb2.Report(step=9)
    value = report.validation_metrics.fields["m"]
    for _ in range(depth):
        value = value.list_value.values.add()
    value.number_value = 1
    return report


def labels(names: list[str], value: str = "x") -> Deed:
    return submit(lambda spec: spec.labels.update(dict.fromkeys(names, value)))


def too_deep(levels: int) -> bytes:
    """A submission with more messages in each other than protobuf reads, written out by hand."""

    def number(value: int) -> bytes:
        return bytes([value]) if value < 128 else bytes([value & 127 | 128, value >> 7])

    content = b""
    for field in [1, 22] * levels + [3, 1]:  # ResidualLayer.layers, Layer.residual; JobSpec.model, the request's spec
        content = number(field << 3 | 2) + number(len(content)) + content
    return content


def link(name: str, target: str) -> Deed:
    def act(world: World) -> Outcome:
        (world.folder / name).unlink(missing_ok=True)
        os.symlink(target.replace("FOLDER", str(world.folder)), world.folder / name)
        return reads(f"FOLDER/{name}")(world)

    return act


def of_anothers_job(world: World) -> Outcome:
    request = pb.ReportProgressRequest(job_id=world.ended, attempt=1)
    return world.call("ReportProgress", request, "worker")


def other_token_first(world: World) -> Outcome:
    good = f"Bearer {world.secrets['root']}"
    headers = (("authorization", "Bearer guessed"), ("authorization", good))
    return world.call("ListJobs", pb.ListJobsRequest(), "", headers)


def page_of_another_filter(world: World) -> Outcome:
    page = pb.ListJobsResponse.FromString(world.send("ListJobs", pb.ListJobsRequest(page_size=1), "root"))
    request = pb.ListJobsRequest(page_size=1, page_token=page.next_page_token, filter="state=RUNNING")
    return world.call("ListJobs", request)


def listed(**fields: object) -> Deed:
    return call("ListJobs", pb.ListJobsRequest(**fields))


INVALID, DENIED, UNKNOWN, FULL = "INVALID_ARGUMENT", "PERMISSION_DENIED", "UNAUTHENTICATED", "RESOURCE_EXHAUSTED"
ABSENT, NO_REQUEST, OUTSIDE = "NOT_FOUND", "are no request of", "is not under a folder this coordinator may read from"
ROWS: dict[str, tuple[Deed, str, str]] = {
    # Bytes that are no message, or another one.
    "bytes that are no protobuf": (call("SubmitJob", b"\xff\xff\xff"), INVALID, "the 3 bytes are no request of Submit"),
    "no protobuf on a stream": (call("WatchJob", b"\xff\xff"), INVALID, "the 2 bytes are no request of WatchJob"),
    "no protobuf by a worker": (call("ReportProgress", b"\x0a\xff", "worker"), INVALID, NO_REQUEST),
    "no protobuf and no token": (call("SubmitJob", b"\xff\xff\xff", ""), UNKNOWN, "asks for a token"),
    "a message cut short": (call("SubmitJob", b"\x0a\x20abc"), INVALID, NO_REQUEST),
    "a length of 2 GiB": (call("GetJob", b"\x0a\xff\xff\xff\xff\x07x"), INVALID, NO_REQUEST),
    "a group that never ends": (call("GetJob", b"\x0b"), INVALID, NO_REQUEST),
    "text that is not UTF-8": (call("GetJob", b"\x0a\x02\xff\xfe"), INVALID, NO_REQUEST),
    "a number for a text": (call("GetJob", b"\x08\x05"), ABSENT, "there is no job ''"),
    "another call's request": (call("SubmitJob", pb.GetJobRequest(job_id="good")), INVALID, NO_REQUEST),
    "an unknown field": (call("ListJobs", b"\xca\x3e\x03abc"), "OK", ""),
    "nothing at all": (call("SubmitJob", b""), INVALID, "optimizer: is required"),
    "deeper than protobuf reads": (call("SubmitJob", too_deep(60)), INVALID, NO_REQUEST),
    "beyond the message limit": (call("SubmitJob", LARGE), FULL, "larger than max"),
    "a call that is not there": (call("DropTables", b""), "UNIMPLEMENTED", "Method not found"),
    "a service that is not there": (call("/paceline.v1.No/GetJob", b""), "UNIMPLEMENTED", "Method not found"),
    # Jobs beyond what a job file holds.
    "layers nested 20 deep": (residuals(20), INVALID, "job file: is nested more than 32 deep"),
    "30000 layers": (layers(30_000, "relu"), INVALID, "job file: holds more than 20000 values"),
    "200000 layers": (layers(200_000, "relu"), INVALID, "bytes, which is not at most 262144"),
    "a path of a megabyte": (reads("FOLDER/" + "x" * 1_000_000), INVALID, "bytes, which is not at most 262144"),
    "5000 faults": (layers(5000, ""), INVALID, " more"),
    # Numbers.
    "a learning rate that is NaN": (setting("optimizer.sgd.learning_rate", NAN), INVALID, "nan is not a finite"),
    "an infinite scale": (setting("data.scale", math.inf), INVALID, "data.scale: inf is not a finite number"),
    "minus infinity": (setting("training.clip_norm", -math.inf), INVALID, "clip_norm: -inf is not a finite number"),
    "two thousand million workers": (setting("workers", MOST_INT32), INVALID, "workers: 2147483647 is not at most"),
    "minus one worker": (setting("workers", -1), INVALID, "workers: -1 is not at least 1"),
    "two thousand million units": (setting("model.0.dense.units", MOST_INT32), INVALID, "is not at most 1000000"),
    "two thousand million servers": (setting("sync.parameter_server.servers", MOST_INT32), INVALID, "at most 64"),
    "a negative batch": (setting("training.batch_size", -1), INVALID, "batch_size: -1 is not at least 0"),
    "a negative seed": (setting("training.seed", -MOST_INT64), INVALID, "is not at least 0"),
    "a priority above all": (setting("priority", MOST_INT32), INVALID, "priority: 2147483647 is not at most 100"),
    "endless retries": (setting("limits.retries", MOST_INT32), INVALID, "limits.retries: 2147483647 is not at most"),
    "seconds that are NaN": (setting("limits.seconds", NAN), INVALID, "limits.seconds: nan is not a finite number"),
    "33 labels": (labels([f"l{n}" for n in range(33)]), INVALID, "labels: has 33 elements, which is not at most 32"),
    "a label that is a path": (labels(["../../etc"]), INVALID, "labels: the name '../../etc' is not"),
    "a label of 100 KB": (labels(["team"], "v" * 100_000), INVALID, "labels.team: 'vvv"),
    # Paths.
    "a way up out of the root": (reads("FOLDER/../../etc/passwd"), DENIED, OUTSIDE),
    "a path elsewhere": (reads("/etc/passwd"), DENIED, OUTSIDE),
    "a root of the same beginning": (reads("FOLDER-beside/x.npz"), DENIED, OUTSIDE),
    "a link out of the root": (link("out", "/etc/passwd"), DENIED, OUTSIDE),
    "a link to itself": (link("loop", "FOLDER/loop"), INVALID, "cannot be resolved"),
    "a relative path": (reads("data/x.npz"), INVALID, "is not absolute"),
    "a NUL in a path": (reads("FOLDER/x\0.npz"), INVALID, "is not a path"),
    "a file URL": (reads("file:///etc/passwd"), DENIED, OUTSIDE),
    "a URL of this machine": (reads("http://169.254.169.254/latest/meta-data"), DENIED, OUTSIDE),
    "weights from elsewhere": (setting("initialize_from", "/elsewhere/model.safetensors"), DENIED, OUTSIDE),
    "a job id that is a path": (call("GetJob", pb.GetJobRequest(job_id="../../etc")), ABSENT, "'../../etc'"),
    "output of a path": (call("PullArtifacts", pb.PullArtifactsRequest(job_id="../../.")), ABSENT, "'../../.'"),
    "logs of a path": (call("StreamLogs", pb.StreamLogsRequest(job_id="/etc")), ABSENT, "'/etc'"),
    "a job id of 3 MB": (call("GetJob", pb.GetJobRequest(job_id="x" * 3_000_000)), ABSENT, "xxx...' here"),
    "a job id with a NUL": (call("CancelJob", pb.CancelJobRequest(job_id="a\0b")), ABSENT, r"'a\x00b'"),
    "a job id that is SQL": (call("GetJob", pb.GetJobRequest(job_id="x' OR '1'='1")), ABSENT, "there is no job"),
    # Lists.
    "a page of minus one": (listed(page_size=-1), INVALID, "page_size: -1 is below 0"),
    "a page of everything": (listed(page_size=MOST_INT32), "OK", ""),
    "a made-up page": (listed(page_token="MTIzLmFi"), INVALID, "page_token: 'MTIzLmFi' is not one a response gave"),
    "a page token of 1 MB": (listed(page_token="A" * 1_000_000), INVALID, "is not one a response gave"),
    "a page of another filter": (page_of_another_filter, INVALID, "it was given for another filter"),
    "a filter without its end": (listed(filter='owner="ada'), INVALID, "filter: a term such as state=RUNNING is expe"),
    "a filter that is SQL": (listed(filter="state=RUNNING; DROP TABLE jobs"), INVALID, "state 'RUNNING;' is not one"),
    "SQL in a filter's text": (listed(filter="owner=\"' OR 1=1 --\""), "OK", ""),
    "a filter by a secret": (listed(filter="token_digest=x"), INVALID, "field 'token_digest' is not one of"),
    "a filter beyond its length": (listed(filter="state=RUNNING AND " * 200), INVALID, "is longer than 2000"),
    "a filter to backtrack in": (listed(filter='owner="' + "\\" * 1900), INVALID, "is expected at"),
    # Repeats.
    "a request id of 129": (submit(bool, request_id="x" * 129), INVALID, "request_id is longer than 128"),
    "a request id with a NUL": (submit(bool, request_id="a\0"), INVALID, "request_id holds a NUL"),
    "a request id of another job": (submit(bool, request_id="once"), "OK", ""),
    "a request id with another job": (
        submit(lambda spec: spec.model.add().relu.SetInParent(), request_id="once"), "ALREADY_EXISTS", "once",
    ),
    # Tokens.
    "no token": (call("ListJobs", pb.ListJobsRequest(), ""), UNKNOWN, "asks for a token"),
    "a guessed token": (call("ListJobs", b"", "", authorization="Bearer guessed"), UNKNOWN, "the token is unknown"),
    "another scheme": (call("ListJobs", b"", "", authorization="Basic YWRhOmFkYQ=="), UNKNOWN, "asks for a token"),
    "a token of nothing": (call("ListJobs", b"", "", authorization="Bearer "), UNKNOWN, "asks for a token"),
    "a token of 20 KB": (call("ListJobs", b"", "", authorization="Bearer " + "x" * 20_000), FULL, "metadata size"),
    "a good token behind a bad one": (other_token_first, UNKNOWN, "the token is unknown here"),
    "a revoked token": (call("ListJobs", pb.ListJobsRequest(), "revoked"), UNKNOWN, "the token is revoked here"),
    "an expired token": (call("ListJobs", pb.ListJobsRequest(), "expired"), UNKNOWN, "the token is expired here"),
    "a worker's token for a person's call": (of_running("GetJob", pb.GetJobRequest, "worker"), UNKNOWN, "is unknown"),
    "a person's token for a report": (
        of_running("ReportProgress", pb.ReportProgressRequest, "root", attempt=1), DENIED, "is not one of a job",
    ),
    "a report for another's job": (of_anothers_job, DENIED, "this token is not one of a job"),
    "a viewer who cancels": (of_running("CancelJob", pb.CancelJobRequest, "viewer"), DENIED, "viewer is viewer"),
    "another user's job": (of_running("GetJob", pb.GetJobRequest, "bob"), ABSENT, "there is no job"),
    "another user's job to cancel": (of_running("CancelJob", pb.CancelJobRequest, "bob"), ABSENT, "there is no job"),
    # Reports of a worker.
    "a report of another attempt": (
        of_running("ReportProgress", pb.ReportProgressRequest, "worker", attempt=7),
        "FAILED_PRECONDITION", "is at attempt 1, this reports for 7",
    ),
    "a rank that is not there": (reports(rank=1), INVALID, "has no rank 1: it has 1"),
    "a step below 0": (reports(job_pb2.Report(step=-1)), INVALID, "report of step -1: step is below 0"),
    "a phase of NaN seconds": (reports(job_pb2.Report(step=9, phase_seconds={"data": NAN})), INVALID, "nan is not a"),
    "50000 transports": (
        reports(sent_bytes={f"t{n}": 1 for n in range(50_000)}), INVALID, "has 50000 names, which is not at most 16",
    ),
    "a transport of 100 KB": (reports(sent_bytes={"t" * 100_000: 1}), INVALID, "a name is longer than 64 characters"),
    "bytes that run backwards": (reports(received_bytes={"mpi": -5}), INVALID, "received_bytes: -5 is not a finite"),
    "a wait that is infinite": (reports(exchange_wait_seconds=math.inf), INVALID, "exchange_wait_seconds: inf is"),
    "a host of 1 MB": (reports(host="h" * 1_000_000), INVALID, "host is longer than 255 characters"),
    "metrics nested 40 deep": (reports(metric(40)), INVALID, "a metric is a number, a list of numbers or a matrix"),
    "a report of 2 MB": (
        reports(job_pb2.Report(step=9, phase_seconds={"x" * 2_000_000: 1})), INVALID, "which is not at most 1572864",
    ),
    # What has ended, or is not there.
    "a cancel of what has ended": (of_ended("CancelJob", pb.CancelJobRequest), "FAILED_PRECONDITION", "is SUCCEEDED"),
    "a resume of what runs": (of_running("ResumeJob", pb.ResumeJobRequest), "FAILED_PRECONDITION", "is RUNNING"),
    "output of what runs": (of_running("PullArtifacts", pb.PullArtifactsRequest), "FAILED_PRECONDITION", "is RUNNING"),
    "a log of rank -1": (of_running("StreamLogs", pb.StreamLogsRequest, rank=-1), INVALID, "has no rank -1"),
    "a watch after the last step": (of_ended("WatchJob", pb.WatchJobRequest, after_step=MOST_INT64), "OK", ""),
    "metrics before the first step": (of_ended("GetMetrics", pb.GetMetricsRequest, after_step=-MOST_INT64), "OK", ""),
    # The HTTP port.
    "a way up in a URL": (http(b"GET /../../etc/passwd HTTP/1.1\r\n\r\n"), "404", "here are /metrics and /healthz"),
    "metrics without a token": (http(b"GET /metrics HTTP/1.1\r\n\r\n"), "401", "this coordinator asks for a token"),
    "a POST": (http(b"POST /metrics HTTP/1.1\r\nContent-Length: 0\r\n\r\n"), "501", ""),
    "no HTTP": (http(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"), "no status", "Error code: 400"),
    "a line without an end": (http(b"GET /" + b"x" * 65_532), "414", ""),  # no more than is read: no reset
    "200 headers": (http(b"GET /healthz HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n"), "431", ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, fake_mpirun: str) -> Iterator[World]:
    with world_in(tmp_path_factory.mktemp("hostile"), fake_mpirun) as made:
        yield made


@pytest.mark.parametrize("row", ROWS)
def test_a_hostile_request_has_its_outcome_and_leaves_no_trace(world: World, caplog, row: str) -> None:
    act, word, said = ROWS[row]
    began = time.monotonic()
    outcome = act(world)
    seconds = time.monotonic() - began
    print(f"row request: {row} {seconds:5.2f} s  {outcome.word}: {outcome.said.partition(chr(10))[0][:110]}")
    assert (outcome.word, said in outcome.said) == (word, True), outcome
    assert len(outcome.said) < 2000
    assert "Traceback" not in caplog.text
    assert world.jobs() == world.before


@pytest.mark.parametrize("port", ["gRPC", "HTTP"])
@pytest.mark.parametrize("sent", [b"", b"PRI * HTTP/2.0\r\n\r\n", b"GET / HTTP/1.1\r\nHost", bytes(range(256)) * 64])
def test_a_hostile_connection_that_stays_half_open_holds_up_nobody(world: World, port: str, sent: bytes) -> None:
    number = {"gRPC": world.coordinator.grpc_address.port, "HTTP": world.coordinator.http.port}[port]
    with world.connection(number) as opened:
        opened.sendall(sent)
        began = time.monotonic()
        assert world.jobs() == world.before
        assert world.http(b"GET /healthz HTTP/1.1\r\n\r\n") == ("200", "ok\n")
        seconds = time.monotonic() - began
    print(f"row connection: {port}, {sent[:14]!r} and then silence {seconds:5.2f} s  others are answered meanwhile")


def test_a_hostile_reader_that_takes_nothing_holds_up_nobody(world: World) -> None:
    """A log of 8 MB: gRPC takes what its windows hold, and the rest stays in the file."""
    job_id = world.running
    logs = world.coordinator.settings.state / "jobs" / job_id / "logs" / "rank-3.log"
    logs.write_bytes(b"x" * 999 + b"\n" + (b"y" * 999 + b"\n") * 8000)
    request = pb.StreamLogsRequest(job_id=job_id)
    streams = [world.send("StreamLogs", request, "ada") for _ in range(8)]
    try:
        began = time.monotonic()
        for stream in streams:
            next(stream)
        assert world.jobs() == world.before
        print(f"row stream: 8 readers that take nothing {time.monotonic() - began:5.2f} s  others are answered")
        for stream in streams[1:]:
            stream.cancel()
        lines = [pb.StreamLogsResponse.FromString(line).line for line in streams[0]]
        assert len(lines[-1]) == 999  # and who reads after all gets all
        assert len(lines) >= 8000
    finally:
        for stream in streams:
            stream.cancel()
        logs.unlink()


def test_a_hostile_caller_of_100_streams_who_leaves_them_gets_a_place_each_time(world: World) -> None:
    began = time.monotonic()
    taken = 0
    while taken < 100:  # more than there are places
        assert time.monotonic() - began < 60
        watch = world.send("WatchJob", pb.WatchJobRequest(job_id=world.running), "ada")
        with contextlib.suppress(grpc.RpcError):  # the last ones are still being let go
            next(watch)
            taken += 1
        watch.cancel()
    print(f"row stream: 100 that are left at once {time.monotonic() - began:5.2f} s  each gets a place")
    assert world.jobs() == world.before


def test_a_hostile_replay_of_a_token_whose_job_has_ended_is_refused(world: World) -> None:
    job_id = world.submit("patient", job_pb2.JOB_STATE_RUNNING)
    world.secrets["dead"] = token_of(job_id)
    request = pb.ReportProgressRequest(job_id=job_id, attempt=1)
    assert world.call("ReportProgress", request, "dead").word == "OK"
    assert world.call("CancelJob", pb.CancelJobRequest(job_id=job_id), "ada").word == "OK"
    assert world.call("WatchJob", pb.WatchJobRequest(job_id=job_id), "ada").word == "OK"
    outcome = world.call("ReportProgress", request, "dead")
    print(f"row token: replayed after its job  {outcome.word}: {outcome.said}")
    assert outcome.word == "PERMISSION_DENIED"
    world.before = world.jobs()
