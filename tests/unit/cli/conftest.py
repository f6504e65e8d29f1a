"""A coordinator that says what a test puts into it, over real gRPC, and the command run against it."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from coordinator.__main__ import main
from protos import coordinator_pb2 as pb
from protos import coordinator_pb2_grpc, job_pb2
from protos.job_file import parse_job

JOB_FILE = """\
name: digits
data: {train: {built_in: digits}, validation_fraction: 0.2}
model: [dense: {units: 16}, relu, dense: {units: 10}]
loss: softmax_cross_entropy
optimizer: {adam: {learning_rate: 0.01}}
training: {epochs: 3, batch_size: 32}
workers: 2
"""


class Refusal(NamedTuple):
    """An error of google.rpc."""

    code: grpc.StatusCode
    message: str
    violations: tuple[tuple[str, str], ...] = ()


class ScriptedCoordinator(coordinator_pb2_grpc.CoordinatorServiceServicer):
    """One job, `job`, and what a test scripts around it."""

    def __init__(self) -> None:
        self.address = ""
        self.job = make_job(job_pb2.JOB_STATE_SUCCEEDED, "every rank finished")
        self.reports = [make_report(epoch) for epoch in (1, 2, 3)]
        self.lines = [("launcher", "warming up"), ("rank-0", "epoch 1"), ("rank-1", "\x1b[31mred")]
        self.files = {"model.safetensors": b"weights" * 1000, "checkpoints/a": b"", "summary.json": b"{}"}
        self.pieces: list[pb.PullArtifactsResponse] | None = None
        self.refusal: Refusal | None = None
        self.requests: list[object] = []

    def _take(self, request: object, context: grpc.ServicerContext) -> None:
        self.requests.append(request)
        if self.refusal is not None:
            context.abort_with_status(rpc_status.to_status(status_of(self.refusal)))

    def SubmitJob(self, request, context):
        self._take(request, context)
        job = job_pb2.Job(spec=request.spec) if request.validate_only else self.job
        return pb.SubmitJobResponse(job=job)

    def GetJob(self, request, context):
        self._take(request, context)
        return pb.GetJobResponse(job=self.job)

    def ListJobs(self, request, context):
        self._take(request, context)
        if request.page_token:
            return pb.ListJobsResponse(jobs=[self.job])
        return pb.ListJobsResponse(jobs=[self.job], next_page_token="second")

    def CancelJob(self, request, context):
        self._take(request, context)
        return pb.CancelJobResponse(job=make_job(job_pb2.JOB_STATE_CANCELLING, "told to stop"))

    def WatchJob(self, request, context):
        self._take(request, context)
        yield pb.WatchJobResponse(job=make_job(job_pb2.JOB_STATE_RUNNING, "2 ranks report"))
        for report in self.reports:
            yield pb.WatchJobResponse(report=report)
        yield pb.WatchJobResponse(job=self.job)

    def StreamLogs(self, request, context):
        self._take(request, context)
        for source, line in self.lines:
            if not request.HasField("rank") or source == f"rank-{request.rank}":
                yield pb.StreamLogsResponse(source=source, line=line)

    def GetMetrics(self, request, context):
        self._take(request, context)
        return pb.GetMetricsResponse(reports=[r for r in self.reports if r.step > request.after_step][:2])

    def PullArtifacts(self, request, context):
        self._take(request, context)
        yield from self.pieces if self.pieces is not None else pieces_of(self.files)


def make_job(state: int, message: str) -> job_pb2.Job:
    job = job_pb2.Job(
        id="digits-1", spec=parse_job(JOB_FILE), state=state, reason="Because", message=message, attempt=1
    )
    job.create_time.FromSeconds(1_700_000_000)
    job.state_time.FromSeconds(1_700_000_060)
    change = job.history.add(state=state, reason="Because", message=message)
    change.time.CopyFrom(job.state_time)
    job.progress.CopyFrom(make_report(3))
    if state == job_pb2.JOB_STATE_SUCCEEDED:
        job.summary.CopyFrom(
            job_pb2.Summary(
                state="SUCCEEDED",
                steps=135,
                epochs=3,
                samples=4314,
                world_size=2,
                train_loss=0.1,
                validation_loss=0.2,
                validation_accuracy=0.95,
                samples_per_second=12345.6,
                seconds_to_first_step=0.5,
                wall_seconds=3.25,
                parameters=1210,
                peak_memory_bytes=70_000_000,
            )
        )
    return job


def make_report(epoch: int) -> job_pb2.Report:
    return job_pb2.Report(
        step=45 * epoch,
        epoch=epoch,
        samples=1438 * epoch,
        loss=1.0 / epoch,
        accuracy=0.5,
        learning_rate=0.01,
        samples_per_second=12345.0,
        wall_seconds=float(epoch),
        phase_seconds={"data": 0.1, "forward": 0.25},
        validation_loss=1.5,
        validation_accuracy=0.75,
        total_steps=135,
    )


def pieces_of(files: dict[str, bytes], piece_bytes: int = 1000) -> Iterator[pb.PullArtifactsResponse]:
    for path, content in files.items():
        starts = range(0, len(content), piece_bytes) or [0]
        for start in starts:
            last = start + piece_bytes >= len(content)
            digest = hashlib.sha256(content).hexdigest() if last else ""
            data = content[start : start + piece_bytes]
            yield pb.PullArtifactsResponse(path=path, offset=start, data=data, size=len(content), sha256=digest)


def status_of(refusal: Refusal) -> status_pb2.Status:
    status = status_pb2.Status(code=refusal.code.value[0], message=refusal.message)
    details = [error_details_pb2.ErrorInfo(reason="Because", domain="paceline")]
    if refusal.violations:
        faults = [error_details_pb2.BadRequest.FieldViolation(field=f, description=d) for f, d in refusal.violations]
        details.append(error_details_pb2.BadRequest(field_violations=faults))
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


@pytest.fixture
def coordinator() -> Iterator[ScriptedCoordinator]:
    """A scripted coordinator on a free port of this machine."""
    servicer = ScriptedCoordinator()
    server = grpc.server(ThreadPoolExecutor(4))
    coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server(servicer, server)
    servicer.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield servicer
    server.stop(0).wait()


class Done(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str


@pytest.fixture
def paceline(monkeypatch, capsys):
    """paceline("get", "ID") -> Done; runs the whole program but the process."""
    monkeypatch.delenv("PACELINE_SERVER", raising=False)
    monkeypatch.delenv("PACELINE_DEBUG", raising=False)

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["paceline", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        return Done(int(left.value.code or 0), out, err)

    return run


@pytest.fixture
def ask(paceline, coordinator):
    """The same for a verb that asks the scripted coordinator."""
    return lambda *arguments: paceline(*arguments, "--server", coordinator.address)


@pytest.fixture
def job_file(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(JOB_FILE)
    return path


@pytest.fixture
def refuse(coordinator):
    """refuse(code, message, violations) makes every call fail so."""

    def script(code: grpc.StatusCode, message: str, *violations: tuple[str, str]) -> None:
        coordinator.refusal = Refusal(code, message, violations)

    return script


@pytest.fixture
def job_in():
    """job_in(state, message) -> Job."""
    return make_job


@pytest.fixture
def report_of():
    """report_of(epoch) -> Report: three epochs of 45 steps."""
    return make_report


@pytest.fixture
def cut():
    """cut(files) -> the pieces PullArtifacts sends."""
    return pieces_of
