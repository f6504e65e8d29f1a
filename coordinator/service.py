"""CoordinatorService over gRPC: translates a call, asks the controller, the store or the files, and answers.

Rules: no decision is made here. A watcher reads the store when its job's bell (changes.py) rings and keeps nothing in
between, so that a slow one falls back to the newest state and costs no memory. Every stream ends when its caller goes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from coordinator import artifacts, auth, logs
from coordinator.admission import NotAllowed, too_large, violations_of
from coordinator.answers import STREAMS_AT_MOST, answer, answer_stream
from coordinator.callers import LOCAL, Caller
from coordinator.changes import Changes
from coordinator.controller import Controller
from coordinator.filters import FilterInvalid, Term, condition_of, read_filter
from coordinator.folders import job_folder
from coordinator.jobs import Job
from coordinator.pages import page_token, read_page_token
from coordinator.permissions import RULES, Reach
from coordinator.quotas import Quotas, check_job
from coordinator.refusals import Refused, no_such_job
from coordinator.store import Store
from protos import coordinator_pb2 as pb
from protos import coordinator_pb2_grpc, job_pb2
from protos.rules import resolve

PAGE_SIZE = 100
PAGE_SIZE_AT_MOST = 1000
REPORTS_AT_ONCE = 100  # read from the store in one go
REPORTS_AT_MOST = 10_000  # in one GetMetrics answer
ANSWER_BYTES_AT_MOST = 2 * 1024 * 1024  # of a list or of reports; gRPC clients take four
REQUEST_ID_AT_MOST = 128
RECHECK_SECONDS = 30.0  # how long a watcher sleeps at most; the bell wakes it long before
LOG_PAUSE_SECONDS = 0.2  # between two looks at growing log files


def nobody(_context: grpc.ServicerContext) -> Caller:
    """The caller where nobody is asked who they are."""
    return LOCAL


class CoordinatorService(coordinator_pb2_grpc.CoordinatorServiceServicer):
    """One for the server; its threads call it side by side."""

    def __init__(
        self,
        *,
        controller: Controller,
        store: Store,
        changes: Changes,
        state: Path,
        data_roots: Sequence[Path | str],
        slots: int,
        quotas: Quotas,
        caller: Callable[[grpc.ServicerContext], Caller] = nobody,
    ) -> None:
        self._controller = controller
        self._store = store
        self._changes = changes
        self._state = state
        self._data_roots = tuple(data_roots)
        self._slots = slots
        self._quotas = quotas
        self._caller = caller  # whose jobs those are that a call submits or lists; the guard has let the call in
        self.streams = threading.Semaphore(STREAMS_AT_MOST)

    # ---------------------------------------------------------------------------------------------------------- jobs

    @answer
    def SubmitJob(self, request: pb.SubmitJobRequest, context: grpc.ServicerContext) -> pb.SubmitJobResponse:
        if len(request.request_id) > REQUEST_ID_AT_MOST:
            raise Refused("InvalidRequest", f"request_id is longer than {REQUEST_ID_AT_MOST} characters")
        if "\0" in request.request_id:
            raise Refused("InvalidRequest", "request_id holds a NUL character")
        if faults := too_large(request.spec) or violations_of(request.spec, self._data_roots, self._slots):
            reason = "DataNotAllowed" if all(isinstance(fault, NotAllowed) for fault in faults) else "InvalidJob"
            raise Refused(reason, "\n".join(f"{path}: {message}" for path, message in faults), faults)
        spec = resolve(request.spec)
        if faults := too_large(spec):  # with its defaults written out
            raise Refused("InvalidJob", str(faults[0]), faults)
        check_job(spec, self._quotas)
        if request.validate_only:
            return pb.SubmitJobResponse(job=job_pb2.Job(spec=spec))
        job = self._controller.submit(spec, request.request_id, self._caller(context).name)
        return pb.SubmitJobResponse(job=to_proto(job, None))

    @answer
    def GetJob(self, request: pb.GetJobRequest, context: grpc.ServicerContext) -> pb.GetJobResponse:
        return pb.GetJobResponse(job=self._with_progress(self._job(request.job_id)))

    @answer
    def ListJobs(self, request: pb.ListJobsRequest, context: grpc.ServicerContext) -> pb.ListJobsResponse:
        if request.page_size < 0:
            raise Refused("InvalidRequest", f"page_size: {request.page_size} is below 0")
        caller = self._caller(context)
        own = RULES["ListJobs"].reach[caller.role] is Reach.OWN
        try:
            terms = read_filter(request.filter)
            condition = condition_of([*terms, Term("owner", "=", caller.name)] if own else terms)
        except FilterInvalid as fault:
            raise Refused("InvalidRequest", f"filter: {fault}") from fault
        try:
            before = read_page_token(request.page_token, request.filter)
        except ValueError as fault:
            raise Refused("InvalidRequest", f"page_token: {fault}") from fault
        size = min(request.page_size or PAGE_SIZE, PAGE_SIZE_AT_MOST)
        page = self._store.page(size, before, condition)
        newest = self._store.newest_reports(job.id for job in page.jobs)
        listed: list[job_pb2.Job] = []
        size_bytes = 0
        for job in page.jobs:
            brief = _brief(to_proto(job, newest.get(job.id)))
            size_bytes += brief.ByteSize()
            if listed and size_bytes > ANSWER_BYTES_AT_MOST:
                break
            listed.append(brief)
        whole = len(listed) == len(page.jobs)
        before = page.next_before if whole else page.numbers[len(listed) - 1]
        return pb.ListJobsResponse(jobs=listed, next_page_token=page_token(before, request.filter))

    @answer
    def CancelJob(self, request: pb.CancelJobRequest, context: grpc.ServicerContext) -> pb.CancelJobResponse:
        return pb.CancelJobResponse(job=self._with_progress(self._controller.cancel(request.job_id)))

    @answer
    def PauseJob(self, request: pb.PauseJobRequest, context: grpc.ServicerContext) -> pb.PauseJobResponse:
        return pb.PauseJobResponse(job=self._with_progress(self._controller.pause(request.job_id)))

    @answer
    def ResumeJob(self, request: pb.ResumeJobRequest, context: grpc.ServicerContext) -> pb.ResumeJobResponse:
        return pb.ResumeJobResponse(job=self._with_progress(self._controller.resume(request.job_id)))

    @answer_stream
    def WatchJob(self, request: pb.WatchJobRequest, context: grpc.ServicerContext) -> Iterator[pb.WatchJobResponse]:
        sent: Job | None = None
        after_number = 0
        with self._changes.watching(request.job_id) as bell:
            listening = self._listen(context, bell.ring)
            while listening():
                seen = bell.count
                job = self._job(request.job_id)  # before the reports: all of an ended job's reports are stored
                if sent is None or (job != sent and not job.ended):
                    yield pb.WatchJobResponse(job=self._with_progress(job))
                    sent = job
                while found := self._store.reports(job.id, request.after_step, after_number, REPORTS_AT_ONCE):
                    for _, report in found:
                        yield pb.WatchJobResponse(report=report)
                    after_number = found[-1].number
                if job.ended:
                    if job != sent or after_number:
                        yield pb.WatchJobResponse(job=self._with_progress(job))
                    return
                if self._changes.closed:
                    raise Refused("CoordinatorStopping", f"the coordinator is stopping; job {job.id} stays {job.state}")
                bell.wait(seen, RECHECK_SECONDS)

    # ------------------------------------------------------------------------------------------ logs, metrics, output

    @answer_stream
    def StreamLogs(
        self, request: pb.StreamLogsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.StreamLogsResponse]:
        job = self._job(request.job_id)
        rank = request.rank if request.HasField("rank") else None
        if rank is not None and not 0 <= rank < job.slots:
            raise Refused("NoSuchRank", f"job {job.id} has no rank {rank}: it has {job.slots}, counted from 0")
        listening = self._listen(context)

        def pause() -> bool:
            time.sleep(LOG_PAUSE_SECONDS)
            return listening()

        def has_ended() -> bool:
            return not request.follow or self._changes.closed or self._job(job.id).ended

        for source, line in logs.follow_logs(job_folder(self._state, job.id).logs, rank, has_ended, pause):
            yield pb.StreamLogsResponse(source=source, line=line)

    @answer
    def GetMetrics(self, request: pb.GetMetricsRequest, context: grpc.ServicerContext) -> pb.GetMetricsResponse:
        job = self._job(request.job_id)
        reports: list[job_pb2.Report] = []
        size_bytes = after_number = 0
        while found := self._store.reports(job.id, request.after_step, after_number, REPORTS_AT_ONCE):
            after_number = found[-1].number
            for _, report in found:
                size_bytes += report.ByteSize()
                if len(reports) >= REPORTS_AT_MOST or size_bytes > ANSWER_BYTES_AT_MOST:
                    # Whole steps only: the next call asks for steps after the last one given.
                    whole = [earlier for earlier in reports if earlier.step < report.step]
                    if whole:
                        return pb.GetMetricsResponse(reports=whole)
                reports.append(report)
        return pb.GetMetricsResponse(reports=reports)

    @answer_stream
    def PullArtifacts(
        self, request: pb.PullArtifactsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.PullArtifactsResponse]:
        job = self._job(request.job_id)
        if not job.ended:
            raise Refused("JobNotEnded", f"job {job.id} is {job.state}: its output can be pulled once it has ended")
        output = job_folder(self._state, job.id).output
        if not output.parent.exists() and job.expires is not None:
            kept = f"they were kept for {job.spec.limits.keep_for:g} s (limits.keep_for)"
            raise Refused("NoOutput", f"the files of job {job.id} are removed: {kept}")
        if not output.is_dir() or output.is_symlink():
            raise Refused("NoOutput", f"job {job.id} left no output: it is {job.state}, {job.message}")
        try:
            yield from artifacts.read_folder(output)
        except artifacts.FileChanged as fault:
            raise Refused("FileChanged", f"the output of job {job.id} changed while it was sent: {fault}") from fault

    # -------------------------------------------------------------------------------------------------- from workers

    @answer
    def ReportProgress(
        self, request: pb.ReportProgressRequest, context: grpc.ServicerContext
    ) -> pb.ReportProgressResponse:
        secret = auth.bearer_token(context.invocation_metadata())
        if secret is None:
            message = "a report needs its job's token as `authorization: Bearer TOKEN`; only its own workers have it"
            raise Refused("TokenMissing", message)
        self._controller.report(request.job_id, secret, request.attempt, request.reports, request.ranks)
        return pb.ReportProgressResponse()

    # ------------------------------------------------------------------------------------------------------- helpers

    def _job(self, job_id: str) -> Job:
        job = self._store.get(job_id)
        if job is None:
            raise no_such_job(job_id)
        return job

    def _with_progress(self, job: Job) -> job_pb2.Job:
        return to_proto(job, self._store.newest_reports([job.id]).get(job.id))

    def _listen(self, context: grpc.ServicerContext, wake: Callable[[], None] = lambda: None) -> Callable[[], bool]:
        """Whether the caller is still there; a caller that goes away wakes its sleeping stream."""
        if not context.add_callback(wake):
            return lambda: False
        return context.is_active


def to_proto(job: Job, progress: job_pb2.Report | None) -> job_pb2.Job:
    """The job as the contract words it."""
    return job_pb2.Job(
        id=job.id,
        spec=job.spec,
        state=f"JOB_STATE_{job.state.value}",
        reason=job.reason,
        message=job.message,
        state_time=_timestamp(job.state_time),
        create_time=_timestamp(job.create_time),
        history=[
            job_pb2.StateChange(
                state=f"JOB_STATE_{state.value}",
                reason=reason,
                message=message,
                time=_timestamp(time),
            )
            for state, reason, message, time in job.history
        ],
        attempt=job.attempt,
        queue_position=job.queue_position,
        progress=progress,
        summary=job.summary,
        owner=job.owner,
    )


def _brief(job: job_pb2.Job) -> job_pb2.Job:
    """A job as lists show it: without what may be long."""
    job.ClearField("history")
    if job.HasField("progress"):
        job.progress.ClearField("validation_metrics")
    if job.HasField("summary"):
        job.summary.ClearField("validation_metrics")
    return job


def _timestamp(time: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(time)
    return stamp
