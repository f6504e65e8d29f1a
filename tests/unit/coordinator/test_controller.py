"""The loop, with a launcher made of memory."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from unittest.mock import Mock

import pytest
from prometheus_client import CollectorRegistry

import coordinator.controller
from coordinator.changes import Changes
from coordinator.controller import Controller
from coordinator.database import StoreUnavailable, sqlite_at
from coordinator.jobs import JobState, Observed, Process
from coordinator.launchers.local import Cause
from coordinator.metrics import Metrics
from coordinator.refusals import Refused
from coordinator.runs import Launcher
from coordinator.scheduler import Capacity
from coordinator.store import Store
from protos import job_pb2
from protos.job_file import parse_job

SPEC = parse_job(
    "{name: digits, data: {train: {built_in: digits}}, model: [{dense: {units: 10}}], loss: softmax_cross_entropy,"
    " optimizer: sgd}"
)


@dataclass
class FakeRunning:
    """Ends when it is told to."""

    process: Process | None = field(default_factory=lambda: Process(2**22 + 1, 1))  # above every real pid
    seen: Observed | None = None
    exit_code: int | None = None
    stuck: bool = False
    secret: str = ""
    terminated: threading.Event = field(default_factory=threading.Event)

    def observed(self) -> Observed | None:
        return self.seen

    def poll(self) -> int | None:
        if self.stuck:
            raise TimeoutError("processes [7] are still there 5 s after SIGKILL")
        return self.exit_code

    def wait(self, timeout_seconds: float) -> int | None:
        return self.poll()

    def ask_to_stop(self) -> None:
        self.exit_code = 5

    def terminate(self, grace_seconds: float) -> int:
        self.exit_code = -15 if self.exit_code is None else self.exit_code
        self.terminated.set()
        return self.exit_code


@dataclass
class Parts:
    controller: Controller
    store: Store
    launched: list[FakeRunning]

    def until(self, wanted: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if wanted():
                return
            time.sleep(0.01)
        raise AssertionError("it did not happen within 20 s")

    def state(self, job_id: str) -> JobState:
        job = self.store.get(job_id)
        assert job is not None
        return job.state


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    store = Store(sqlite_at(tmp_path / "paceline.sqlite"))
    launched: list[FakeRunning] = []

    def start(job, secret, folder) -> FakeRunning:
        launched.append(FakeRunning(secret=secret))
        return launched[-1]

    clock = lambda: datetime.now(UTC)  # noqa: E731
    controller = Controller(
        store=store,
        launcher=Launcher(
            start, lambda job, folder: None, lambda run, code, logs: Cause("RankFailed", f"exit code {code}")
        ),
        metrics=Metrics(2, clock, store.count_by_state, CollectorRegistry()),
        changes=Changes(),
        state=tmp_path,
        capacity=Capacity(2, 60),
        clock=clock,
    )
    yield Parts(controller, store, launched)
    controller.stop()
    store.close()


def test_the_loop_outlives_a_store_that_fails_and_says_so_meanwhile(parts, monkeypatch) -> None:
    monkeypatch.setattr(coordinator.controller, "RETRY_SECONDS", 0.01)
    failed = threading.Event()

    def full_disk(job) -> None:
        failed.set()
        raise OSError("No space left on device")

    monkeypatch.setattr(parts.store, "save", full_disk)
    parts.controller.start()
    job_id = parts.controller.submit(SPEC).id
    assert failed.wait(10)
    parts.until(lambda: parts.controller.fault == "OSError: No space left on device")
    assert parts.state(job_id) is JobState.QUEUED
    monkeypatch.undo()
    parts.until(lambda: parts.state(job_id) is JobState.STARTING)
    parts.until(lambda: parts.controller.fault is None)
    assert len(parts.launched) == 1


def test_a_store_that_went_away_is_one_line_in_health_and_log_and_the_loop_goes_on(parts, monkeypatch, caplog) -> None:
    monkeypatch.setattr(coordinator.controller, "RETRY_SECONDS", 0.01)
    away = StoreUnavailable("the job store cannot be used now: gone")
    parts.controller.start()
    job_id = parts.controller.submit(SPEC).id
    parts.until(lambda: len(parts.launched) == 1)
    monkeypatch.setattr(parts.store, "save", Mock(side_effect=away))
    parts.launched[0].exit_code = 3
    parts.until(lambda: parts.controller.fault == str(away))
    monkeypatch.undo()
    parts.until(lambda: parts.state(job_id) is JobState.FAILED)
    parts.until(lambda: parts.controller.fault is None)
    told = [record for record in caplog.records if record.levelname == "ERROR"]
    assert [(record.message[: len(str(away))], record.exc_info) for record in told] == [(str(away), None)]


def test_a_job_stored_by_a_commit_whose_answer_was_lost_is_started_all_the_same(parts, monkeypatch) -> None:
    monkeypatch.setattr(coordinator.controller, "RETRY_SECONDS", 0.01)
    add = parts.store.add

    def add_and_lose_the_answer(job, request_id) -> None:
        add(job, request_id)
        raise StoreUnavailable("the job store cannot be used now: gone")

    parts.controller.start()
    monkeypatch.setattr(parts.store, "add", add_and_lose_the_answer)
    with pytest.raises(StoreUnavailable):
        parts.controller.submit(SPEC, "once")
    monkeypatch.undo()
    job_id = parts.controller.submit(SPEC, "once").id
    parts.until(lambda: len(parts.launched) == 1)
    assert parts.state(job_id) is JobState.STARTING
    assert len(parts.store.page(10).jobs) == 1


def test_a_rank_that_cannot_be_killed_fails_its_job_and_not_the_loop(parts) -> None:
    parts.controller.start()
    stuck, other = parts.controller.submit(SPEC).id, parts.controller.submit(SPEC).id
    parts.until(lambda: len(parts.launched) == 2)
    parts.launched[0].stuck = True
    parts.until(lambda: parts.state(stuck) is JobState.FAILED)
    assert parts.store.get(stuck).reason == "ProcessesRemain"
    parts.launched[1].exit_code = 3
    parts.until(lambda: parts.state(other) is JobState.FAILED)
    assert parts.store.get(other).message == "exit code 3"


def test_reports_take_a_job_from_starting_to_running_and_are_counted_once(parts) -> None:
    parts.controller.start()
    job_id = parts.controller.submit(SPEC).id
    parts.until(lambda: len(parts.launched) == 1)
    line = job_pb2.Report(step=1, loss=1.0)
    for _ in range(2):
        parts.controller.report(job_id, parts.launched[0].secret, 1, [line], [])
    assert parts.state(job_id) is JobState.RUNNING
    assert len(parts.store.reports(job_id)) == 1


def test_a_cancelled_job_is_cancelled_only_when_its_processes_are_gone(parts) -> None:
    parts.controller.start()
    job_id = parts.controller.submit(SPEC).id
    parts.until(lambda: len(parts.launched) == 1)
    assert parts.controller.cancel(job_id).state is JobState.CANCELLING
    parts.until(lambda: parts.state(job_id) is JobState.CANCELLED)
    assert parts.launched[0].terminated.is_set()


def test_a_job_between_its_slots_and_its_launch_is_launched_when_the_coordinator_comes_back(parts, make_job) -> None:
    for job_id, state in (("digits-000001", JobState.STARTING), ("digits-000002", JobState.CANCELLING)):
        parts.store.add(make_job(job_id, state, spec=SPEC, token_digest="0" * 64))
    parts.controller.start()
    assert parts.state("digits-000002") is JobState.CANCELLED
    parts.until(lambda: len(parts.launched) == 1)
    parts.until(lambda: parts.state("digits-000001") is JobState.STARTING)
    history = parts.store.get("digits-000001").history  # the loop may have launched it before we look
    restarting = next(change for change in history if change.state is JobState.RESTARTING)
    assert restarting.reason == "CoordinatorRestarted"
    assert "it had not been launched yet: it is launched now" in restarting.message


def test_a_paused_job_gives_its_slots_back_and_goes_on_as_another_attempt(parts) -> None:
    parts.controller.start()
    job_id = parts.controller.submit(SPEC).id
    parts.until(lambda: len(parts.launched) == 1)
    parts.controller.report(job_id, parts.launched[0].secret, 1, [job_pb2.Report(step=1)], [])
    asked = parts.controller.pause(job_id)
    assert (asked.state, asked.reason) == (JobState.RUNNING, "PauseRequested")
    parts.until(lambda: parts.state(job_id) is JobState.PAUSED)
    assert parts.controller.pause(job_id).state is JobState.PAUSED
    assert parts.controller.resume(job_id).state is JobState.QUEUED
    parts.until(lambda: len(parts.launched) == 2)
    assert parts.store.get(job_id).attempt == 2


def test_what_cannot_be_paused_or_resumed_is_refused_and_stays_as_it_is(parts, monkeypatch) -> None:
    parts.controller.start()
    job_id = parts.controller.submit(SPEC).id
    parts.until(lambda: len(parts.launched) == 1)
    parts.until(lambda: parts.store.get(job_id).process is not None)
    before = parts.store.get(job_id)
    with pytest.raises(Refused, match="is STARTING: only a paused job can be resumed"):
        parts.controller.resume(job_id)
    assert parts.store.get(job_id) == before
    monkeypatch.setattr(parts.launched[0], "terminate", lambda grace: parts.launched[0].terminated.wait(20))
    parts.controller.cancel(job_id)
    with pytest.raises(Refused, match="is CANCELLING: there is nothing left to pause"):
        parts.controller.pause(job_id)
    parts.launched[0].exit_code = -15
    parts.launched[0].terminated.set()
    parts.until(lambda: parts.state(job_id) is JobState.CANCELLED)
    for ask in (parts.controller.pause, parts.controller.resume):
        with pytest.raises(Refused, match="is CANCELLED"):
            ask(job_id)


def test_a_pause_that_a_fault_of_the_job_came_before_fails_it(parts, monkeypatch) -> None:
    parts.controller.start()
    job_id = parts.controller.submit(SPEC).id
    parts.until(lambda: len(parts.launched) == 1)
    parts.controller.report(job_id, parts.launched[0].secret, 1, [job_pb2.Report(step=1)], [])
    monkeypatch.setattr(parts.launched[0], "ask_to_stop", lambda: setattr(parts.launched[0], "exit_code", 1))
    parts.controller.pause(job_id)
    parts.until(lambda: parts.state(job_id) is JobState.FAILED)


def test_a_coordinator_that_stops_takes_no_job_but_still_answers_a_repeated_submit(parts) -> None:
    parts.controller.start()
    first = parts.controller.submit(SPEC, "once")
    parts.controller.stop()
    assert parts.controller.submit(SPEC, "once").id == first.id
    with pytest.raises(Refused, match="takes no jobs"):
        parts.controller.submit(SPEC)


def test_a_launched_job_says_what_another_system_says_of_it(parts) -> None:
    parts.controller.start()
    job_id = parts.controller.submit(SPEC).id
    parts.until(lambda: parts.state(job_id) is JobState.STARTING and bool(parts.launched))
    parts.launched[0].seen = Observed("HeldForNodes", "Slurm job 7 waits (Resources)")
    parts.until(lambda: parts.store.get(job_id).reason == "HeldForNodes")
    parts.controller.cancel(job_id)
    parts.until(lambda: parts.state(job_id) is JobState.CANCELLED)
    assert [change.reason for change in parts.store.get(job_id).history][1:3] == ["Launching", "HeldForNodes"]
