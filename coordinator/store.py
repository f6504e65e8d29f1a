"""The truth about jobs, in one SQLite file: jobs, their history, what their workers reported, request ids.

Rules: a row of `history` or `reports` is only ever added; a job's newest state is the last row of its history; whatever
a call returned is on disk. Times are whole microseconds since 1970 UTC. Any thread may call; writes are one at a time.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa

from coordinator.jobs import ENDED, Job, JobState, Process, StateChange
from protos import job_pb2

SCHEMA_VERSION = 1
BUSY_SECONDS = 10  # how long a write waits for another program that reads the file
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

_tables = sa.MetaData()
_jobs = sa.Table(
    "jobs",
    _tables,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),  # the order of submission
    sa.Column("id", sa.Text, nullable=False, unique=True),
    sa.Column("spec", sa.LargeBinary, nullable=False),
    sa.Column("state", sa.Text, nullable=False, index=True),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("queue_position", sa.Integer, nullable=False),
    sa.Column("token_digest", sa.Text),
    sa.Column("pid", sa.Integer),
    sa.Column("start_ticks", sa.Integer),
    sa.Column("summary", sa.LargeBinary),
    sqlite_autoincrement=True,
)
_history = sa.Table(
    "history",
    _tables,
    sa.Column("job", sa.Integer, sa.ForeignKey("jobs.number"), primary_key=True),
    sa.Column("place", sa.Integer, primary_key=True),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("time_microseconds", sa.Integer, nullable=False),
)
_reports = sa.Table(
    "reports",
    _tables,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("job", sa.Integer, sa.ForeignKey("jobs.number"), nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("report", sa.LargeBinary, nullable=False),
    sa.Index("reports_by_step", "job", "step"),
    sa.Index("reports_by_number", "job", "number"),
    sqlite_autoincrement=True,
)
_requests = sa.Table(
    "requests",
    _tables,
    sa.Column("request_id", sa.Text, primary_key=True),
    sa.Column("job", sa.Integer, sa.ForeignKey("jobs.number"), nullable=False),
)


class StoreUnusable(Exception):
    """The file is not a store this version can use; the message says which and what to do."""


class NumberedReport(NamedTuple):
    """A report and its place among all reports, by which a reader goes on where it stopped."""

    number: int
    report: job_pb2.Report


class JobPage(NamedTuple):
    jobs: list[Job]  # newest first
    next_before: int | None  # what to give as `before` for the page after; None on the last page


class Store:
    """The open file."""

    def __init__(self, path: Path) -> None:
        self._write = threading.Lock()
        self._engine = sa.create_engine(f"sqlite:///{path}", connect_args={"timeout": BUSY_SECONDS}, max_overflow=-1)
        sa.event.listen(self._engine, "connect", _prepare)
        try:
            with self._engine.begin() as connection:
                version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
                if version not in (0, SCHEMA_VERSION):
                    raise StoreUnusable(
                        f"{path} was written by another version of paceline (schema {version}, this one has "
                        f"{SCHEMA_VERSION}): use that version or another --state folder"
                    )
                _tables.create_all(connection)
                connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")
        except sa.exc.DBAPIError as fault:
            self._engine.dispose()
            raise StoreUnusable(f"{path} cannot be used as a job store: {fault.orig}") from fault
        except StoreUnusable:
            self._engine.dispose()
            raise

    def close(self) -> None:
        self._engine.dispose()

    # ------------------------------------------------------------------------------------------------------- writing

    def add(self, job: Job, request_id: str = "") -> None:
        """Store a new job and the request that made it, both or neither. KeyError when the id is taken."""
        with self._write, self._engine.begin() as connection:
            if connection.execute(sa.select(_jobs.c.number).where(_jobs.c.id == job.id)).first():
                raise KeyError(job.id)
            row = {"id": job.id, "spec": job.spec.SerializeToString(deterministic=True), **_changing(job)}
            number = connection.execute(sa.insert(_jobs).values(row).returning(_jobs.c.number)).scalar_one()
            connection.execute(sa.insert(_history), _history_rows(number, job.history))
            if request_id:
                connection.execute(sa.insert(_requests).values(request_id=request_id, job=number))

    def save(self, job: Job) -> None:
        """Store what `advance` made of a job. KeyError when there is no such job."""
        with self._write, self._engine.begin() as connection:
            number = connection.execute(sa.select(_jobs.c.number).where(_jobs.c.id == job.id)).scalar_one_or_none()
            if number is None:
                raise KeyError(job.id)
            connection.execute(sa.update(_jobs).where(_jobs.c.number == number).values(_changing(job)))
            count = sa.select(sa.func.count()).select_from(_history).where(_history.c.job == number)
            stored = connection.execute(count).scalar_one()
            if new := _history_rows(number, job.history)[stored:]:
                connection.execute(sa.insert(_history), new)

    def add_reports(self, job_id: str, attempt: int, reports: Sequence[job_pb2.Report]) -> list[job_pb2.Report]:
        """Store the reports that are new and return those: a worker that had no answer sends its lines again."""
        if not reports:
            return []
        with self._write, self._engine.begin() as connection:
            number = connection.execute(sa.select(_jobs.c.number).where(_jobs.c.id == job_id)).scalar_one()
            known = connection.execute(
                sa.select(_reports.c.report).where(
                    _reports.c.job == number,
                    _reports.c.attempt == attempt,
                    _reports.c.step.in_({report.step for report in reports}),
                )
            ).scalars()
            seen = set(known)
            new: list[job_pb2.Report] = []
            rows: list[dict[str, Any]] = []
            for report in reports:
                line = report.SerializeToString(deterministic=True)
                if line not in seen:
                    seen.add(line)
                    new.append(report)
                    rows.append({"job": number, "attempt": attempt, "step": report.step, "report": line})
            if rows:
                connection.execute(sa.insert(_reports), rows)
            return new

    # ------------------------------------------------------------------------------------------------------- reading

    def get(self, job_id: str) -> Job | None:
        return next(iter(self._read(sa.select(_jobs).where(_jobs.c.id == job_id))), None)

    def request(self, request_id: str) -> Job | None:
        """The job a request made."""
        made = sa.select(_requests.c.job).where(_requests.c.request_id == request_id)
        return next(iter(self._read(sa.select(_jobs).where(_jobs.c.number.in_(made)))), None)

    def open_jobs(self) -> list[Job]:
        """Every job that has not ended, in the order of submission."""
        return self._read(sa.select(_jobs).where(_jobs.c.state.not_in(ENDED)).order_by(_jobs.c.number))

    def page(self, size: int, before: int | None = None) -> JobPage:
        """The newest jobs submitted before that one."""
        query = sa.select(_jobs.c.number).order_by(_jobs.c.number.desc()).limit(size + 1)
        if before is not None:
            query = query.where(_jobs.c.number < before)
        with self._engine.connect() as connection:
            numbers = list(connection.execute(query).scalars())
        shown = numbers[:size]
        jobs = self._read(sa.select(_jobs).where(_jobs.c.number.in_(shown)).order_by(_jobs.c.number.desc()))
        return JobPage(jobs, shown[-1] if len(numbers) > size else None)

    def count_by_state(self) -> dict[JobState, int]:
        """How many jobs are in each state, zeros included."""
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(_jobs.c.state, sa.func.count()).group_by(_jobs.c.state)).all()
        found = {row[0]: row[1] for row in rows}
        return {state: found.get(state.value, 0) for state in JobState}

    def reports(
        self, job_id: str, after_step: int = 0, after_number: int = 0, limit: int = 1000
    ) -> list[NumberedReport]:
        """Reports of later steps and later numbers, oldest first, at most `limit`."""
        query = (
            sa.select(_reports.c.number, _reports.c.report)
            .join(_jobs, _jobs.c.number == _reports.c.job)
            .where(_jobs.c.id == job_id, _reports.c.step > after_step, _reports.c.number > after_number)
            .order_by(_reports.c.number)
            .limit(limit)
        )
        with self._engine.connect() as connection:
            rows = connection.execute(query).all()
        return [NumberedReport(number, job_pb2.Report.FromString(line)) for number, line in rows]

    def newest_reports(self, job_ids: Iterable[str]) -> dict[str, job_pb2.Report]:
        """The last report of each of these jobs that has one."""
        newest = (
            sa.select(sa.func.max(_reports.c.number))
            .join(_jobs, _jobs.c.number == _reports.c.job)
            .where(_jobs.c.id.in_(list(job_ids)))
            .group_by(_reports.c.job)
        )
        query = (
            sa.select(_jobs.c.id, _reports.c.report)
            .join(_jobs, _jobs.c.number == _reports.c.job)
            .where(_reports.c.number.in_(newest))
        )
        with self._engine.connect() as connection:
            return {job_id: job_pb2.Report.FromString(line) for job_id, line in connection.execute(query)}

    def _read(self, query: sa.Select[Any]) -> list[Job]:
        with self._engine.connect() as connection:
            rows = connection.execute(query).all()
            numbers = [row.number for row in rows]
            query = sa.select(_history).where(_history.c.job.in_(numbers)).order_by(_history.c.place)
            histories: dict[int, list[StateChange]] = {number: [] for number in numbers}
            for change in connection.execute(query):
                entered = _EPOCH + change.time_microseconds * _MICROSECOND
                histories[change.job].append(
                    StateChange(JobState(change.state), change.reason, change.message, entered)
                )
        return [_job(row, tuple(histories[row.number])) for row in rows]


def _prepare(connection: sqlite3.Connection, _record: object) -> None:
    """WAL lets readers and the writer work side by side; FULL puts every commit on disk before it returns."""
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _changing(job: Job) -> dict[str, Any]:
    """The columns of a job that change."""
    return {
        "state": job.state.value,
        "reason": job.reason,
        "message": job.message,
        "attempt": job.attempt,
        "queue_position": job.queue_position,
        "token_digest": job.token_digest,
        "pid": job.process.pid if job.process else None,
        "start_ticks": job.process.start_ticks if job.process else None,
        "summary": job.summary.SerializeToString(deterministic=True) if job.summary else None,
    }


def _history_rows(number: int, history: Sequence[StateChange]) -> list[dict[str, Any]]:
    return [
        {
            "job": number,
            "place": place,
            "state": change.state.value,
            "reason": change.reason,
            "message": change.message,
            "time_microseconds": (change.time - _EPOCH) // _MICROSECOND,
        }
        for place, change in enumerate(history)
    ]


def _job(row: sa.Row[Any], history: tuple[StateChange, ...]) -> Job:
    return Job(
        id=row.id,
        spec=job_pb2.JobSpec.FromString(row.spec),
        history=history,
        reason=row.reason,
        message=row.message,
        attempt=row.attempt,
        queue_position=row.queue_position,
        token_digest=row.token_digest,
        process=None if row.pid is None else Process(row.pid, row.start_ticks),
        summary=None if row.summary is None else job_pb2.Summary.FromString(row.summary),
    )
