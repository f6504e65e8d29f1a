"""The only loop: observes launched jobs, decides, persists, acts.

Rules: a job's state changes under one lock and is on disk before anyone is told or any process is touched. A call
(submit, pause, cancel, report) only writes down what is wanted or was seen; the loop makes it so. What happens to a
launched job is decided when its processes are gone, never before, so that its slots are free when they are given away.
This process may be killed between any two of these steps: the next coordinator takes over what it finds (takeover.py).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from coordinator import auth, jobs, measured, recovery
from coordinator.changes import Changes
from coordinator.database import StoreUnavailable
from coordinator.folders import SummaryUnreadable, job_folder
from coordinator.jobs import LAUNCHED, PLACED, Event, Job, JobState
from coordinator.launchers.local import LauncherMissing
from coordinator.metrics import Metrics
from coordinator.quotas import check_queue
from coordinator.refusals import Refused, no_such_job
from coordinator.retention import Retention
from coordinator.runs import Launcher, Run
from coordinator.scheduler import Action, Capacity, GiveUp, Start, Wait, decide
from coordinator.store import Store
from coordinator.takeover import take_over, unreported
from protos import coordinator_pb2, job_pb2
from protos.exit_codes import ExitCode

POLL_SECONDS = 0.05  # how soon the end of a process is seen; with nothing launched the loop sleeps until it is woken
RETRY_SECONDS = 1.0  # after a fault of the loop itself, or of the store

log = logging.getLogger("paceline.controller")


class Controller:
    """The state of every job that has not ended. Threads may call everything but start."""

    def __init__(
        self,
        *,
        store: Store,
        launcher: Launcher,
        metrics: Metrics,
        changes: Changes,
        state: Path,
        capacity: Capacity,
        clock: Callable[[], datetime],
        grace_seconds: float = 5.0,
    ) -> None:
        self._store = store
        self._launcher = launcher
        self._metrics = metrics
        self._changes = changes
        self._state = state
        self._capacity = capacity
        self._clock = clock
        self._grace_seconds = grace_seconds
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopping = False
        self._ends_jobs = True  # when it stops
        self._jobs: dict[str, Job] = {}  # open jobs, in the order of submission
        self._runs: dict[str, Run] = {}
        self._queue_changed = True  # since the queue was last looked at
        self._served: dict[str, datetime] = {}  # when a job of each owner was last launched
        self._retention = Retention(store, state, clock)
        self._unsure: set[str] = set()  # submitted while the store went away: whether they are in it, it alone knows
        self._thread = threading.Thread(target=self._loop, name="controller", daemon=True)
        self.fault: str | None = None  # what the loop last stumbled over, None when its last round was good

    # ------------------------------------------------------------------------------------------- what calls write down

    def submit(self, spec: job_pb2.JobSpec, request_id: str = "", owner: str = "") -> Job:
        """Queue a checked and resolved job; the same request again returns the first job."""
        with self._lock:
            if request_id and (first := self._store.request(request_id, owner)) is not None:
                if first.spec == spec:
                    return first
                message = f"request id {request_id!r} made job {first.id} from another job file: use a new id"
                raise Refused("RequestIdReused", message)
            if self._stopping:
                raise Refused("CoordinatorStopping", "the coordinator is stopping and takes no jobs")
            waiting = Counter(job.owner for job in self._jobs.values() if job.state is JobState.QUEUED)
            check_queue(self._capacity.quotas, waiting.total(), waiting[owner])
            while True:
                job = jobs.submitted(jobs.new_id(spec.name), spec, self._clock(), owner)
                try:
                    self._store.add(job, request_id)
                except KeyError:
                    continue  # the id is taken; 30 random bits make a second one free
                except StoreUnavailable:
                    self._unsure.add(job.id)
                    self._wake.set()
                    raise
                self._jobs[job.id] = job
                self._queue_changed = True
                self._wake.set()
                return job

    def cancel(self, job_id: str) -> Job:
        """Ask for the job's end; asking again is no fault until it has ended."""
        return self._ask(job_id, jobs.CancelAsked(), "there is nothing left to cancel")

    def pause(self, job_id: str) -> Job:
        """Ask that its ranks write a checkpoint and leave; asking again is no fault."""
        return self._ask(job_id, jobs.PauseAsked(), "there is nothing left to pause")

    def resume(self, job_id: str) -> Job:
        """Queue a paused job again."""
        return self._ask(job_id, jobs.ResumeAsked(), "only a paused job can be resumed")

    def _ask(self, job_id: str, event: Event, consequence: str) -> Job:
        with self._lock:
            if (job := self._jobs.get(job_id)) is None:
                if (ended := self._store.get(job_id)) is None:
                    raise no_such_job(job_id)
                raise Refused("JobEnded", f"job {job_id} is {ended.state}: {consequence}")
            try:
                moved = self._move(job, event)
            except jobs.IllegalMove as fault:
                words = f"{job.state}, being paused" if job.pausing else job.state
                raise Refused("NotPossibleNow", f"job {job_id} is {words}: {consequence}") from fault
            self._wake.set()
            return moved

    def report(
        self,
        job_id: str,
        secret: str,
        attempt: int,
        reports: Sequence[job_pb2.Report],
        ranks: Sequence[coordinator_pb2.RankReport],
    ) -> None:
        """Take in what the ranks of a launched job measured."""
        with self._lock:
            job = self._jobs.get(job_id)
            if job is None or not auth.matches(secret, job.token_digest):
                raise Refused("TokenRefused", f"this token is not one of a job {job_id} that has not ended")
            if attempt != job.attempt:
                raise Refused("AttemptOver", f"job {job_id} is at attempt {job.attempt}, this reports for {attempt}")
            for rank in ranks:
                if not 0 <= rank.rank < job.slots:
                    raise Refused("NoSuchRank", f"job {job_id} has no rank {rank.rank}: it has {job.slots}, from 0")
            if fault := measured.fault_of(reports, ranks):
                raise Refused("InvalidRequest", fault)
            new = self._store.add_reports(job_id, attempt, reports)
            self._metrics.reported(job_id, new, ranks)
            if job.state is JobState.STARTING:
                if (seconds := recovery.recovery_seconds(job, self._clock())) is not None:
                    self._metrics.recovered(seconds)
                self._move(job, jobs.Reported())
            elif new:
                self._changes.ring(job_id)

    # --------------------------------------------------------------------------------------------------- life and loop

    def start(self) -> None:
        """Take over the jobs of an earlier coordinator, then begin to work."""
        with self._lock:
            for job in self._store.open_jobs():
                self._jobs[job.id] = job
                if job.state not in LAUNCHED:
                    continue
                found = take_over(job, self._launcher, job_folder(self._state, job.id), self._grace_seconds)
                if isinstance(found, tuple):
                    self._move(job, found)
                    continue
                log.info("job %s: %s: taken over from an earlier coordinator", job.id, job.state)
                self._runs[job.id] = Run(found, adopted=True)
            for job_id, report in self._store.newest_reports(self._jobs).items():
                self._metrics.known(job_id, report)
        self._thread.start()

    def stop(self, end_jobs: bool = True) -> None:
        """End the loop, and before it every launched job unless those are left to the next coordinator."""
        message = (
            "the coordinator was stopped while this job ran; the next one launches it again, from its newest checkpoint"
        )
        with self._lock:
            self._stopping, self._ends_jobs = True, end_jobs
            for job_id, run in self._runs.items():
                if end_jobs and not self._jobs[job_id].pausing:
                    run.ending = run.ending or jobs.Lost(recovery.COORDINATOR_STOPPED, message)
        self._wake.set()
        if self._thread.ident is None:  # start() failed
            return
        self._thread.join(self._grace_seconds + 15)  # SIGTERM's grace, SIGKILL's, and something for a busy machine
        if self._thread.is_alive():
            log.error("launched jobs did not end in time: %s", ", ".join(self._runs))

    def _loop(self) -> None:
        while True:
            self._wake.clear()
            try:
                with self._lock:
                    self._stop_unwanted()  # first: it needs no store
                    self._take_in_unsure()
                    self._observe()
                    self._decide()
                    self._stop_unwanted()
                    self._metrics.slots_used(sum(job.slots for job in self._jobs.values() if job.state in PLACED))
                    if self._stopping and not (self._runs and self._ends_jobs):
                        return
                    restarting = any(job.state is JobState.RESTARTING for job in self._jobs.values())
                    watched = bool(self._runs) or restarting
                until_sweep_seconds = self._retention.sweep()  # beside the lock: a folder may be large
                if self.fault is not None:
                    log.info("the controller's loop goes on")
                self.fault = None
            except StoreUnavailable as fault:
                if self.fault != str(fault):
                    log.error("%s; it is tried again every %g s", fault, RETRY_SECONDS)
                self.fault = str(fault)
                time.sleep(RETRY_SECONDS)
                continue
            except Exception as fault:  # whatever it is, it must not end the loop that every job depends on
                log.exception("the controller's loop failed; it tries again in %g s", RETRY_SECONDS)
                self.fault = f"{type(fault).__name__}: {fault}"
                time.sleep(RETRY_SECONDS)
                continue
            self._wake.wait(POLL_SECONDS if watched else until_sweep_seconds)

    def _take_in_unsure(self) -> None:
        """Queue what was stored although its submitter was told that the store had gone away."""
        for job_id in list(self._unsure):
            job = self._store.get(job_id)
            if job is not None:
                self._jobs[job_id] = job
                self._queue_changed = True
            self._unsure.discard(job_id)

    # -------------------------------------------------------------------------------------------------- observe and end

    def _observe(self) -> None:
        for job_id, run in list(self._runs.items()):
            job = self._jobs[job_id]
            try:
                exit_code = run.running.poll()
                if exit_code is None or run.busy:
                    self._take_in_observed(job, run)
                    continue
                end = self._end(job, run, exit_code)
            except TimeoutError as fault:  # the launcher ended and a rank cannot be killed: stuck in the kernel
                cancelling = job.state is JobState.CANCELLING
                end = jobs.Stopped(str(fault)) if cancelling else jobs.Broke("ProcessesRemain", str(fault))
            self._move(job, end)
            del self._runs[job_id]

    def _take_in_observed(self, job: Job, run: Run) -> None:
        """Say why a launch that another system was given has not come to its first step."""
        if job.state is not JobState.STARTING or run.busy or (seen := run.running.observed()) is None:
            return
        if (job.reason, job.message) != seen:
            self._move(job, seen)

    def _end(self, job: Job, run: Run, exit_code: int) -> Event:
        """What the end of a job's processes means."""
        folder = job_folder(self._state, job.id)
        if run.adopted:  # some of its reports may have found nobody to take them
            for reports in unreported(folder):
                self._metrics.reported(job.id, self._store.add_reports(job.id, job.attempt, reports), ())
        if job.state is JobState.CANCELLING:
            return jobs.Stopped("cancelled; its ranks have ended")
        if run.ending is not None and not (exit_code == ExitCode.DONE and isinstance(run.ending, jobs.Lost)):
            return run.ending
        if exit_code == ExitCode.DONE:
            try:
                return jobs.Finished(folder.summary())
            except SummaryUnreadable as fault:
                no_summary = f"{fault}; `paceline logs {job.id}` shows what its ranks said"
                if self._launcher.explain(run.running, exit_code, folder.logs).reason != "HostLost":
                    return jobs.Broke("NoSummary", no_summary)
        if exit_code == ExitCode.INTERRUPTED:
            if job.pausing:
                return jobs.Paused("paused; its ranks wrote a checkpoint and left")
            return recovery.after_loss(job, "Interrupted", "a rank was told to end by a signal, and all left")
        cause = self._launcher.explain(run.running, exit_code, folder.logs)
        if job.pausing and recovery.is_retried(cause.reason, cause.message, cause.exit_code):
            return jobs.Paused("paused without another checkpoint: " + cause.message)
        last_lines = "".join(f"\n  {line}" for line in cause.last_lines)
        message = cause.message + (f"\nlast log lines:{last_lines}" if last_lines else "")
        return recovery.after_loss(job, cause.reason, message, cause.exit_code)

    # --------------------------------------------------------------------------------------------------- decide and act

    def _decide(self) -> None:
        if self._stopping:
            return
        # A long queue is looked at when something has changed; a deadline passes without that.
        looked_at = [job for job in self._jobs.values() if self._queue_changed or job.state in PLACED]
        self._queue_changed = False
        try:
            self._act(decide(self._clock(), looked_at, self._capacity, self._served))
        except BaseException:
            self._queue_changed = True
            raise

    def _act(self, actions: Sequence[Action]) -> None:
        waiting: list[Job] = []
        for action in actions:
            match action:
                case Start(job_id):
                    self._launch(self._jobs[job_id])
                case Wait(job_id, reason, message, position):
                    job, waited = self._jobs[job_id], jobs.Waited(reason, message, position)
                    if (job.reason, job.message, job.queue_position) != waited:
                        waiting.append(jobs.advance(job, waited, self._clock()))
                case GiveUp(job_id, reason, message):
                    broke = jobs.Broke(reason, message)
                    if (run := self._runs.get(job_id)) is None:  # a fault of ours came between its slots and its launch
                        self._move(self._jobs[job_id], broke)
                    else:
                        run.ending = run.ending or broke
        if waiting:
            self._store.save_queue(waiting)
            self._jobs.update({job.id: job for job in waiting})
            self._changes.ring(*(job.id for job in waiting))

    def _launch(self, job: Job) -> None:
        token = auth.new_token()
        now = self._clock()
        if job.state is JobState.QUEUED:
            self._metrics.started((now - job.state_time).total_seconds())
        self._served[job.owner] = now
        job = self._move(job, jobs.Admitted(token.digest))
        folder = job_folder(self._state, job.id)
        try:
            folder.create(job)
            running = self._launcher.start(job, token.secret, folder)
        except (OSError, LauncherMissing) as fault:
            self._move(job, jobs.Broke("LaunchFailed", f"could not be launched: {fault}"))
            self._wake.set()
            return
        self._runs[job.id] = Run(running)
        if running.process is not None:
            self._move(job, jobs.Launched(running.process))

    def _stop_unwanted(self) -> None:
        for job_id, run in self._runs.items():
            job = self._jobs[job_id]
            stopping = self._stopping and self._ends_jobs
            if run.ending is not None or job.state is JobState.CANCELLING or stopping:
                run.end(job, self._grace_seconds, self._wake.set)
            elif job.pausing:
                run.pause(job, self._grace_seconds, self._wake.set)

    def _move(self, job: Job, event: Event) -> Job:
        """Advance, persist, tell."""
        moved = jobs.advance(job, event, self._clock())
        if moved is job:
            return job
        self._store.save(moved)
        if moved.state is not job.state:
            self._queue_changed = True
            log.info("job %s: %s: %s", moved.id, moved.state, moved.message)
        if moved.ended:
            del self._jobs[moved.id]
            self._metrics.ended(moved.id, moved.spec.limits.keep_for)
            if moved.expires is not None:
                self._retention.note(moved.expires)
            self._wake.set()
        else:
            self._jobs[moved.id] = moved
        self._changes.ring(job.id)
        return moved
