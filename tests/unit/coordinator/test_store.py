"""What the store keeps, across closing and reopening."""

import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from coordinator import jobs
from coordinator.jobs import JobState, advance
from coordinator.store import Store, StoreUnusable
from protos import job_pb2


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "paceline.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    store = Store(path)
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


def test_what_was_stored_is_there_after_a_restart(store, path, make_job) -> None:
    store.add(make_job(), request_id="once")
    store.add_reports("digits-000000", 1, [report(1, loss=2.0)])
    store.close()
    again = Store(path)
    assert again.get("digits-000000") == make_job()
    assert again.request("once") == make_job()
    assert [found.report for found in again.reports("digits-000000")] == [report(1, loss=2.0)]
    again.close()


def test_history_rows_are_added_and_never_rewritten(store, path, make_job, noon) -> None:
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
    assert [job.state for job in store.open_jobs()] == ["QUEUED", "STARTING", "RUNNING", "CANCELLING"]
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


def test_the_file_lets_readers_in_while_it_is_written(store, path) -> None:
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def test_a_store_of_another_version_is_left_alone(path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StoreUnusable, match="another version of paceline \\(schema 99, this one has 1\\)"):
        Store(path)


def test_a_file_that_is_no_store_is_named(path) -> None:
    path.write_text("not a database, but long enough to look like a file that has a header " * 20)
    with pytest.raises(StoreUnusable, match=r"paceline.sqlite cannot be used as a job store: file is not a database"):
        Store(path)
