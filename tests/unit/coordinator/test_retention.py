"""Files of ended jobs go when their time is over, and not before."""

from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from coordinator import jobs
from coordinator.database import sqlite_at
from coordinator.folders import job_folder
from coordinator.jobs import JobState, advance
from coordinator.retention import AGAIN, Retention
from coordinator.store import Store


class Clock:
    def __init__(self, now: datetime) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def clock(noon) -> Clock:
    return Clock(noon)


@pytest.fixture
def store(tmp_path):
    store = Store(sqlite_at(tmp_path / "paceline.sqlite"))
    yield store
    store.close()


@pytest.fixture
def end_job(store, make_job, tmp_path, noon):
    """Jobs that ended at noon, with files."""

    def end(job_id: str, keep_for: float) -> Path:
        job = make_job(job_id, JobState.STARTING)
        job.spec.limits.keep_for = keep_for
        store.add(job)
        job_folder(tmp_path, job_id).create(job)
        store.save(advance(job, jobs.Broke("RankFailed", "for a test"), noon))
        return job_folder(tmp_path, job_id).path

    return end


def test_files_go_when_their_time_is_over_and_the_job_with_its_history_stays(
    store, end_job, clock, noon, tmp_path
) -> None:
    short, long, for_ever = end_job("short", 10), end_job("long", 100), end_job("for-ever", 0)
    retention = Retention(store, tmp_path, clock)
    assert retention.sweep() == 10
    clock.now = noon + timedelta(seconds=9)
    assert retention.sweep() == 1
    assert short.exists()
    clock.now = noon + timedelta(seconds=10)
    assert retention.sweep() == 90
    assert [path.exists() for path in (short, long, for_ever)] == [False, True, True]
    assert [change.state for change in store.get("short").history] == ["STARTING", "FAILED"]
    clock.now = noon + timedelta(days=1000)
    assert Retention(store, tmp_path, clock).sweep() is None  # a coordinator that comes back after their time
    assert [path.exists() for path in (long, for_ever)] == [False, True]


def test_a_job_that_ends_later_is_noted_and_one_without_files_is_done_with(
    store, make_job, clock, noon, tmp_path
) -> None:
    retention = Retention(store, tmp_path, clock)
    assert retention.sweep() is None
    job = make_job()
    job.spec.limits.keep_for = 5
    store.add(job)
    ended = advance(job, jobs.CancelAsked(), noon)
    store.save(ended)
    retention.note(ended.expires)
    assert retention.sweep() == 5
    clock.now += timedelta(seconds=5)
    assert retention.sweep() is None
    assert store.expiries() == []


def test_a_folder_that_cannot_be_removed_is_tried_again_later(
    store, end_job, clock, tmp_path, monkeypatch, noon
) -> None:
    folder = end_job("short", 10)
    clock.now = noon + timedelta(seconds=10)
    retention = Retention(store, tmp_path, clock)

    def refuse(path) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr("coordinator.retention.shutil.rmtree", refuse)
    assert retention.sweep() == AGAIN.total_seconds()
    monkeypatch.undo()
    assert folder.exists()
    clock.now += AGAIN
    assert retention.sweep() is None
    assert not folder.exists()


def test_only_a_job_that_has_ended_and_is_not_kept_for_ever_expires(make_job, noon) -> None:
    job = make_job()
    assert job.expires is None
    job.spec.limits.keep_for = 60
    assert job.expires is None
    assert replace(job, history=(job.history[0]._replace(state=JobState.FAILED),)).expires == noon + timedelta(
        minutes=1
    )
