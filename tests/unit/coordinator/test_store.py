"""What the store keeps, across closing and reopening: the same in SQLite and in PostgreSQL."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from coordinator import jobs
from coordinator.database import read_store, sqlite_at
from coordinator.filters import condition_of, read_filter
from coordinator.jobs import JobState, advance
from coordinator.store import Store
from protos import job_pb2


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> sa.URL:
    """An empty database."""
    if request.param == "sqlite":
        return sqlite_at(tmp_path / "paceline.sqlite")
    return read_store(request.getfixturevalue("postgres").new_database())


@pytest.fixture
def store(url: sa.URL) -> Iterator[Store]:
    store = Store(url)
    yield store
    store.close()


def report(step: int, **fields: float) -> job_pb2.Report:
    return job_pb2.Report(step=step, phase_seconds={"forward": 0.1, "backward": 0.2}, **fields)


def test_a_job_read_back_equals_the_job_stored_at_every_point_of_its_life(store, make_job, noon) -> None:
    job = make_job()
    store.add(job)
    for number, event in enumerate(
        (
            jobs.Waited("WaitingForSlots", "needs 1 slot, 0 free", 1),
            jobs.Admitted("digest"),
            jobs.Launched(jobs.Process(12, 345)),
            jobs.Reported(),
            jobs.Finished(job_pb2.Summary(steps=7, validation_loss=0.5)),
        )
    ):
        job = advance(job, event, noon + timedelta(microseconds=number))
        store.save(job)
        assert store.get(job.id) == job


def test_what_was_stored_is_there_after_a_restart(store, url, make_job) -> None:
    store.add(make_job(), request_id="once")
    store.add_reports("digits-000000", 1, [report(1, loss=2.0)])
    store.close()
    again = Store(url)
    assert again.get("digits-000000") == make_job()
    assert again.request("once") == make_job()
    assert [found.report for found in again.reports("digits-000000")] == [report(1, loss=2.0)]
    again.close()


def test_history_rows_are_added_and_never_rewritten(store, make_job, noon) -> None:
    job = make_job()
    store.add(job)
    moved = advance(job, jobs.Admitted("digest"), noon)
    changed = replace(moved, history=(moved.history[0]._replace(message="another past"), *moved.history[1:]))
    store.save(changed)
    kept = store.get(job.id)
    assert kept is not None
    assert kept.history == moved.history


def test_a_taken_id_is_refused_and_its_request_is_not_stored(store, make_job) -> None:
    store.add(make_job())
    with pytest.raises(KeyError):
        store.add(make_job(), request_id="twice")
    assert store.request("twice") is None


def test_an_unknown_job_is_none_and_cannot_be_saved(store, make_job) -> None:
    assert store.get("digits-000000") is None
    with pytest.raises(KeyError):
        store.save(make_job())


def test_open_jobs_come_in_the_order_of_submission(store, make_job) -> None:
    for number, state in enumerate(JobState):
        store.add(make_job(f"job-{number}", state))
    assert [job.state for job in store.open_jobs()] == [
        *("QUEUED", "STARTING", "RUNNING", "PAUSED", "RESTARTING", "CANCELLING"),
    ]
    assert store.count_by_state() == dict.fromkeys(JobState, 1)


def test_pages_hold_every_job_once_newest_first(store, make_job) -> None:
    for number in range(7):
        store.add(make_job(f"job-{number}"))
    seen, before = [], None
    while True:
        page = store.page(3, before)
        seen.append([job.id for job in page.jobs])
        if (before := page.next_before) is None:
            break
    assert seen == [["job-6", "job-5", "job-4"], ["job-3", "job-2", "job-1"], ["job-0"]]


def test_steps_that_a_later_attempt_does_again_are_those_of_the_first(store, make_job) -> None:
    store.add(make_job())
    evaluation = report(4, validation_loss=0.5)
    store.add_reports("digits-000000", 1, [report(2), report(4)])
    assert store.add_reports("digits-000000", 2, [report(3, loss=9.0), report(4, loss=9.0)]) == []
    assert store.add_reports("digits-000000", 2, [evaluation, report(6)]) == [evaluation, report(6)]
    assert store.add_reports("digits-000000", 3, [report(6, loss=9.0), report(7)]) == [report(7)]
    assert [line.report.step for line in store.reports("digits-000000")] == [2, 4, 4, 6, 7]


def test_a_report_sent_again_is_stored_once_and_an_evaluation_of_the_same_step_is_another(store, make_job) -> None:
    store.add(make_job())
    first, evaluation, second = report(1, loss=2.0), report(1, validation_loss=1.5), report(2, loss=1.0)
    assert store.add_reports("digits-000000", 1, [first]) == [first]
    assert store.add_reports("digits-000000", 1, [first, evaluation, second]) == [evaluation, second]
    assert store.add_reports("digits-000000", 1, [second]) == []
    found = store.reports("digits-000000")
    assert [line.report for line in found] == [first, evaluation, second]
    assert [line.report for line in store.reports("digits-000000", after_step=1)] == [second]
    assert [line.report for line in store.reports("digits-000000", after_number=found[0].number, limit=1)] == [
        evaluation
    ]


def test_the_newest_report_is_each_jobs_own(store, make_job) -> None:
    for name in ("job-a", "job-b", "job-c"):
        store.add(make_job(name))
    store.add_reports("job-a", 1, [report(1), report(2)])
    store.add_reports("job-b", 1, [report(5)])
    assert store.newest_reports(["job-a", "job-b", "job-c"]) == {"job-a": report(2), "job-b": report(5)}
    assert store.newest_reports(["job-a"]) == {"job-a": report(2)}


def test_a_move_whose_commit_nobody_was_told_of_gives_way_to_what_became_of_the_job(store, make_job, noon) -> None:
    job = make_job()
    store.add(job)
    store.save(advance(job, jobs.Admitted("digest"), noon))  # the answer was lost: `job` is all that is known
    cancelled = advance(job, jobs.CancelAsked(), noon)
    store.save(cancelled)
    assert store.get(job.id) == cancelled
    assert store.open_jobs() == []


def test_a_text_with_a_nul_character_is_kept_readable(store, make_job, noon) -> None:
    store.add(make_job())
    store.save(advance(make_job(), jobs.Waited("Why", "a\0b", 1), noon))
    kept = store.get("digits-000000")
    assert kept is not None
    assert kept.message == "a\\x00b"
    assert store.get("a\0b") is None


def test_readers_see_one_moment_while_another_thread_writes(store, make_job) -> None:
    job = make_job()
    store.add(job)
    torn: list[object] = []
    written = threading.Event()

    def read() -> None:
        while not written.is_set():
            found = store.get(job.id)
            if found.history[-1].reason != found.reason:
                torn.append(found)

    thread = threading.Thread(target=read)
    thread.start()
    moved = job
    for number in range(100):
        change = job.history[0]._replace(reason=f"Change{number}")
        moved = replace(moved, reason=change.reason, history=(*moved.history, change))
        store.save(moved)
    written.set()
    thread.join()
    assert torn == []
    assert store.get(job.id) == moved


def test_a_filter_finds_the_jobs_it_names_and_pages_stay_while_jobs_are_added(store, make_job) -> None:
    def add(number: int, owner: str = "", priority: int = 0, **labels: str) -> None:
        job = make_job(f"job-{number}", JobState.RUNNING if number % 2 else JobState.QUEUED, owner=owner)
        job.spec.priority = priority
        job.spec.labels.update(labels)
        store.add(job)

    add(0, "ada", 5, team="vision")
    add(1, "ada", 0, team="speech", kind="test")
    add(2, "bob", -5, team="vision", kind="test")
    add(3, 'it\'s "bob"', 0)

    def found(text: str) -> str:
        return "".join(job.id[-1] for job in store.page(10, None, condition_of(read_filter(text))).jobs)

    assert found("") == "3210"
    assert found("state=RUNNING") == "31"
    assert found("state!=RUNNING AND owner=ada") == "0"
    assert found("labels.team=vision") == "20"
    assert found("labels.team!=vision") == "31"
    assert found("labels.team=vision AND labels.kind=test") == "2"
    assert found("priority>=0 AND priority<5") == "31"
    assert found("priority<0") == "2"
    assert found(r'owner="it\'s \"bob\""'.replace(r"\'", "'")) == "3"
    condition = condition_of(read_filter("labels.team=vision"))
    first = store.page(1, None, condition)
    add(4, team="vision")
    second = store.page(1, first.next_before, condition)
    assert [page.jobs[0].id for page in (first, second)] == ["job-2", "job-0"]
    assert second.next_before is None


def test_why_the_whole_queue_waits_is_stored_at_once(store, make_job, noon) -> None:
    waiting = [make_job(f"job-{number}") for number in range(3)]
    for job in waiting:
        store.add(job)
    moved = [
        advance(job, jobs.Waited("WaitingForTurn", f"place {place}", place), noon)
        for place, job in enumerate(waiting, 1)
    ]
    store.save_queue(moved)
    store.save_queue([])
    assert store.open_jobs() == moved
