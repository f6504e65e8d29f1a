"""Calls the coordinator over gRPC and turns what goes wrong into plain words.

Rules: every call has a deadline. A stream that outlives its own is opened again where it stopped, after asking
whether the coordinator still answers, so that a dead connection is noticed within STREAM_SECONDS + CALL_SECONDS.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, cast

import grpc
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # ships no stubs
from grpc_status import rpc_status

from coordinator.addresses import AddressInvalid, parse_address
from coordinator.credentials import NO_CREDENTIALS, Credentials
from coordinator.faults import CommandFault
from protos import coordinator_pb2, coordinator_pb2_grpc, job_pb2
from protos.exit_codes import ExitCode

CALL_SECONDS = 10.0
STREAM_SECONDS = 300.0
REOPEN_SECONDS = 0.1  # before a cut stream is opened again
PULL_SECONDS = 3600.0  # a folder cannot be resumed in the middle, so its stream may be as long as a slow network needs
MESSAGE_BYTES = 64 * 1024 * 1024  # all reports of a long job in one GetMetrics

ENDED = frozenset((job_pb2.JOB_STATE_CANCELLED, job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED))

EXIT_CODES = {
    grpc.StatusCode.INVALID_ARGUMENT: ExitCode.USAGE,
    grpc.StatusCode.UNAVAILABLE: ExitCode.UNREACHABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: ExitCode.UNREACHABLE,
    grpc.StatusCode.PERMISSION_DENIED: ExitCode.NOT_ALLOWED,
    grpc.StatusCode.UNAUTHENTICATED: ExitCode.NOT_ALLOWED,
}


class Client:
    """The verbs of one coordinator. Every method raises CommandFault when the answer is no, or none."""

    def __init__(self, address: str, credentials: Credentials = NO_CREDENTIALS) -> None:
        self.address = address
        self._credentials = credentials
        try:
            self._parsed = parse_address("--server", address)
        except AddressInvalid as fault:
            raise CommandFault(str(fault), ExitCode.USAGE) from fault
        options: list[tuple[str, int]] = [("grpc.max_receive_message_length", MESSAGE_BYTES)]
        credentials.check(self._parsed)
        if self._parsed.loopback:
            options.append(("grpc.enable_http_proxy", 0))  # no proxy can reach our loopback
        self._channel = open_channel(address, credentials, options)
        self._metadata = (("authorization", f"Bearer {credentials.token}"),) if credentials.token else ()
        self._stub = coordinator_pb2_grpc.CoordinatorServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def submit(self, spec: job_pb2.JobSpec, request_id: str = "", validate_only: bool = False) -> job_pb2.Job:
        request = coordinator_pb2.SubmitJobRequest(spec=spec, request_id=request_id, validate_only=validate_only)
        job: job_pb2.Job = self._call(self._stub.SubmitJob, request).job
        return job

    def get(self, job_id: str) -> job_pb2.Job:
        job: job_pb2.Job = self._call(self._stub.GetJob, coordinator_pb2.GetJobRequest(job_id=job_id)).job
        return job

    def list_jobs(self, limit: int, filter_text: str = "") -> tuple[list[job_pb2.Job], bool]:
        """The newest jobs that the filter lets through, and whether there are more."""
        jobs: list[job_pb2.Job] = []
        token = ""
        while True:
            size = min(limit - len(jobs), 1000)
            request = coordinator_pb2.ListJobsRequest(page_size=size, page_token=token, filter=filter_text)
            page = self._call(self._stub.ListJobs, request)
            jobs += page.jobs
            token = page.next_page_token
            if not token or len(jobs) >= limit:
                return jobs[:limit], bool(token) or len(jobs) > limit

    def cancel(self, job_id: str) -> job_pb2.Job:
        job: job_pb2.Job = self._call(self._stub.CancelJob, coordinator_pb2.CancelJobRequest(job_id=job_id)).job
        return job

    def pause(self, job_id: str) -> job_pb2.Job:
        job: job_pb2.Job = self._call(self._stub.PauseJob, coordinator_pb2.PauseJobRequest(job_id=job_id)).job
        return job

    def resume(self, job_id: str) -> job_pb2.Job:
        job: job_pb2.Job = self._call(self._stub.ResumeJob, coordinator_pb2.ResumeJobRequest(job_id=job_id)).job
        return job

    def metrics(self, job_id: str) -> list[job_pb2.Report]:
        """Every report so far; one answer holds only so many, so it is asked until there are no later ones."""
        reports: list[job_pb2.Report] = []
        while True:
            after_step = reports[-1].step if reports else 0
            request = coordinator_pb2.GetMetricsRequest(job_id=job_id, after_step=after_step)
            found = self._call(self._stub.GetMetrics, request).reports
            if not found:
                return reports
            reports += found

    def watch(self, job_id: str) -> Iterator[job_pb2.Job | job_pb2.Report]:
        """The job as it is, then each change and report, until it has ended."""
        after_step = 0
        while True:
            request = coordinator_pb2.WatchJobRequest(job_id=job_id, after_step=after_step)
            ended = False
            for response in self._stream(self._stub.WatchJob, request, STREAM_SECONDS):
                if response.WhichOneof("event") == "report":
                    after_step = max(after_step, response.report.step)
                    yield response.report
                else:
                    ended = response.job.state in ENDED
                    yield response.job
            if ended:
                return
            self.get(job_id)  # the stream was cut: go on only where somebody still answers
            time.sleep(REOPEN_SECONDS)

    def logs(self, job_id: str, follow: bool, rank: int | None = None) -> Iterator[coordinator_pb2.StreamLogsResponse]:
        """Each log line once; with `follow` until the job has ended."""
        request = coordinator_pb2.StreamLogsRequest(job_id=job_id, follow=follow, rank=rank)
        given: Counter[str] = Counter()
        while True:
            ended = not follow or self.get(job_id).state in ENDED  # asked first: what was written before is read after
            seen: Counter[str] = Counter()
            for line in self._stream(self._stub.StreamLogs, request, STREAM_SECONDS if follow else PULL_SECONDS):
                seen[line.source] += 1
                if seen[line.source] > given[line.source]:
                    given[line.source] += 1
                    yield line
            if ended:
                return
            time.sleep(REOPEN_SECONDS)

    def pull(self, job_id: str) -> Iterator[coordinator_pb2.PullArtifactsResponse]:
        """The pieces of the output folder, in order."""
        call = self._stub.PullArtifacts(
            coordinator_pb2.PullArtifactsRequest(job_id=job_id), **self._options(PULL_SECONDS)
        )
        with self._plain_words():
            yield from call

    def _call(self, method: Callable[..., Any], request: Any) -> Any:
        with self._plain_words():
            return method(request, **self._options(CALL_SECONDS))

    def _stream(self, method: Callable[..., Any], request: Any, seconds: float) -> Iterator[Any]:
        """What the server sends, until it is done or the deadline is over."""
        call = method(request, **self._options(seconds))
        try:
            with self._plain_words(deadline_is_fine=True):
                yield from call
        finally:
            call.cancel()

    def _options(self, seconds: float) -> dict[str, Any]:
        return {"timeout": seconds, "metadata": self._metadata}

    @contextlib.contextmanager
    def _plain_words(self, deadline_is_fine: bool = False) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            if deadline_is_fine and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                from coordinator.tls_probe import tls_fault

                if fault := tls_fault(self._parsed, self._credentials):
                    raise CommandFault(fault, ExitCode.UNREACHABLE) from error
            raise CommandFault(*explain_error(error, self.address)) from error


def open_channel(address: str, credentials: Credentials, options: list[tuple[str, int]]) -> grpc.Channel:
    """A channel as the credentials ask."""
    if not credentials.tls:
        return grpc.insecure_channel(address, options=options)
    roots, key, certificate = (part or None for part in (credentials.ca, credentials.key, credentials.certificate))
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(roots, key, certificate), options=options)


def explain_error(error: grpc.RpcError, address: str) -> tuple[str, ExitCode]:
    """One line for each fault, and the exit code."""
    call = cast(grpc.Call, error)  # every RpcError of a call is one; the stubs cannot say so
    code = call.code()
    exit_code = EXIT_CODES.get(code, ExitCode.FAILED)
    status = rpc_status.from_call(call)
    if status is None and code is grpc.StatusCode.UNAVAILABLE:
        absent = f"no coordinator answers at {address}: start one with `paceline serve`, or name another with --server"
        return absent, exit_code
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"the coordinator at {address} does not answer in time: is it that address? is it busy?", exit_code
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return f"what answers at {address} is no Paceline coordinator, or one of another version", exit_code
    violations = list(_violations(status))
    if violations:
        return "\n".join(violations), exit_code
    words = " ".join((call.details() or "").split())
    if not words:
        words = f"the coordinator at {address} answered {code.name} and said nothing more; see its log"
    return words, exit_code


def _violations(status: status_pb2.Status | None) -> Iterator[str]:
    for detail in status.details if status is not None else ():
        faults = error_details_pb2.BadRequest()
        if detail.Unpack(faults):
            for fault in faults.field_violations:
                yield f"{fault.field}: {fault.description}" if fault.field else fault.description
