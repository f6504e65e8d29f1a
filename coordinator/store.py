"""The truth about jobs, in a database: jobs, their history, what their workers reported, request ids, labels.

Rules: a row of `history` or `reports` is only ever added; a job's newest state is the last row of its history; whatever
a call returned is on disk. Any thread may call; every call raises StoreUnavailable when the database does not answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa

from coordinator.database import Database
from coordinator.jobs import ENDED, Job, JobState, StateChange, is_id
from coordinator.rows import change_of, changing_columns, fixed_columns, history_rows, job_of, label_rows
from coordinator.schema import history, jobs, labels, reports, requests
from coordinator.tokens import Tokens
from protos import job_pb2


class NumberedReport(NamedTuple):
    """A report and its place among all reports, by which a reader goes on where it stopped."""

    number: int
    report: job_pb2.Report


class JobPage(NamedTuple):
    jobs: list[Job]  # newest first
    numbers: list[int]  # of these jobs: what to give as `before` for what lies behind each
    next_before: int | None  # what to give as `before` for the page after; None on the last page


class Store:
    """The open database. StoreUnusable where it cannot be opened."""

    def __init__(self, url: sa.URL) -> None:
        self._database = Database(url)
        self.tokens = Tokens(self._database)

    def close(self) -> None:
        self._database.close()

    # ------------------------------------------------------------------------------------------------------- writing

    def add(self, job: Job, request_id: str = "") -> None:
        """Store a new job and the request that made it, both or neither. KeyError when the id is taken."""
        with self._database.writing() as connection:
            if connection.execute(sa.select(jobs.c.number).where(jobs.c.id == job.id)).first():
                raise KeyError(job.id)
            row = {**fixed_columns(job), **changing_columns(job)}
            number = connection.execute(sa.insert(jobs).values(row).returning(jobs.c.number)).scalar_one()
            connection.execute(sa.insert(history), history_rows(number, job.history))
            if rows := label_rows(number, job):
                connection.execute(sa.insert(labels), rows)
            if request_id:
                connection.execute(sa.insert(requests).values(request_id=_key(job.owner, request_id), job=number))

    def save(self, job: Job) -> None:
        """Store what `advance` made of a job. KeyError when there is no such job.

        `advance` enters one state at most. So a stored row in that one's place, or behind it, is of a move whose commit
        nobody was told of, because the database went away: it gives way to what became of the job instead.
        """
        with self._database.writing() as connection:
            number = connection.execute(sa.select(jobs.c.number).where(jobs.c.id == job.id)).scalar_one_or_none()
            if number is None:
                raise KeyError(job.id)
            connection.execute(sa.update(jobs).where(jobs.c.number == number).values(changing_columns(job)))
            last = len(job.history) - 1
            tail = sa.and_(history.c.job == number, history.c.place >= last)
            stored = connection.execute(sa.select(history.c.state).where(tail)).scalars().all()
            if stored != [job.state.value]:
                if stored:
                    connection.execute(sa.delete(history).where(tail))
                connection.execute(sa.insert(history), history_rows(number, job.history)[last:])

    def save_queue(self, waiting: Sequence[Job]) -> None:
        """Store why each of these jobs waits, and its place, at once: the whole queue moves when one job starts."""
        rows = [
            {"waiting": job.id, "reason": job.reason, "message": job.message, "queue_position": job.queue_position}
            for job in waiting
        ]
        if rows:
            with self._database.writing() as connection:
                connection.execute(sa.update(jobs).where(jobs.c.id == sa.bindparam("waiting")), rows)

    def add_reports(self, job_id: str, attempt: int, new_reports: Sequence[job_pb2.Report]) -> list[job_pb2.Report]:
        """Store the reports that are new and return those.

        Not new are lines that a worker sends again because it had no answer, and steps that an earlier attempt has
        reported already: a job that goes on from a checkpoint does some twice.
        """
        if not new_reports:
            return []
        with self._database.writing() as connection:
            number = connection.execute(sa.select(jobs.c.number).where(jobs.c.id == job_id)).scalar_one()
            own = sa.and_(reports.c.job == number, reports.c.attempt == attempt)
            steps = {report.step for report in new_reports}
            known = connection.execute(sa.select(reports.c.report).where(own, reports.c.step.in_(steps))).scalars()
            seen = set(known)
            before = sa.and_(reports.c.job == number, reports.c.attempt < attempt)
            last = connection.execute(sa.select(sa.func.max(reports.c.step)).where(before)).scalar_one() or 0
            at_last = connection.execute(sa.select(reports.c.report).where(before, reports.c.step == last)).scalars()
            evaluated = any(job_pb2.Report.FromString(line).HasField("validation_loss") for line in at_last)
            new: list[job_pb2.Report] = []
            rows: list[dict[str, Any]] = []
            for report in new_reports:
                line = report.SerializeToString(deterministic=True)
                evaluates = report.step == last and report.HasField("validation_loss") and not evaluated
                if line not in seen and (report.step > last or evaluates):
                    seen.add(line)
                    new.append(report)
                    rows.append({"job": number, "attempt": attempt, "step": report.step, "report": line})
            if rows:
                connection.execute(sa.insert(reports), rows)
            return new

    def mark_removed(self, job_id: str) -> None:
        """The files of an ended job are gone; it does not expire again."""
        with self._database.writing() as connection:
            connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(expires_microseconds=None))

    # ------------------------------------------------------------------------------------------------------- reading

    def get(self, job_id: str) -> Job | None:
        return next(iter(self._read(sa.select(jobs).where(jobs.c.id == job_id))), None) if is_id(job_id) else None

    def owner(self, job_id: str) -> str | None:
        """Whose job it is; None where there is no such job."""
        if not is_id(job_id):
            return None
        with self._database.reading() as connection:
            return connection.execute(sa.select(jobs.c.owner).where(jobs.c.id == job_id)).scalar_one_or_none()

    def request(self, request_id: str, owner: str = "") -> Job | None:
        """The job that this owner's request made."""
        made = sa.select(requests.c.job).where(requests.c.request_id == _key(owner, request_id))
        return next(iter(self._read(sa.select(jobs).where(jobs.c.number.in_(made)))), None)

    def open_jobs(self) -> list[Job]:
        """Every job that has not ended, in the order of submission."""
        return self._read(sa.select(jobs).where(jobs.c.state.not_in(ENDED)).order_by(jobs.c.number))

    def page(self, size: int, before: int | None = None, condition: sa.ColumnElement[bool] | None = None) -> JobPage:
        """The newest jobs submitted before that one, of those that fulfil the condition."""
        query = sa.select(jobs.c.number).order_by(jobs.c.number.desc()).limit(size + 1)
        if before is not None:
            query = query.where(jobs.c.number < before)
        if condition is not None:
            query = query.where(condition)
        with self._database.reading() as connection:
            numbers = list(connection.execute(query).scalars())
        shown = numbers[:size]
        found = self._read(sa.select(jobs).where(jobs.c.number.in_(shown)).order_by(jobs.c.number.desc()))
        return JobPage(found, shown, shown[-1] if len(numbers) > size else None)

    def count_by_state(self) -> dict[JobState, int]:
        """How many jobs are in each state, zeros included."""
        with self._database.reading() as connection:
            rows = connection.execute(sa.select(jobs.c.state, sa.func.count()).group_by(jobs.c.state)).all()
        found = {row[0]: row[1] for row in rows}
        return {state: found.get(state.value, 0) for state in JobState}

    def expiries(self) -> list[tuple[str, int]]:
        """Ended jobs whose files are to be removed, with the microsecond since 1970 when; the first to go first."""
        when = jobs.c.expires_microseconds
        query = sa.select(jobs.c.id, when).where(when.is_not(None)).order_by(when)
        with self._database.reading() as connection:
            return [(row.id, row.expires_microseconds) for row in connection.execute(query)]

    def reports(
        self, job_id: str, after_step: int = 0, after_number: int = 0, limit: int = 1000
    ) -> list[NumberedReport]:
        """Reports of later steps and later numbers, oldest first, at most `limit`."""
        query = (
            sa.select(reports.c.number, reports.c.report)
            .join(jobs, jobs.c.number == reports.c.job)
            .where(jobs.c.id == job_id, reports.c.step > after_step, reports.c.number > after_number)
            .order_by(reports.c.number)
            .limit(limit)
        )
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        return [NumberedReport(number, job_pb2.Report.FromString(line)) for number, line in rows]

    def newest_reports(self, job_ids: Iterable[str]) -> dict[str, job_pb2.Report]:
        """The last report of each of these jobs that has one."""
        newest = (
            sa.select(sa.func.max(reports.c.number))
            .join(jobs, jobs.c.number == reports.c.job)
            .where(jobs.c.id.in_(list(job_ids)))
            .group_by(reports.c.job)
        )
        query = (
            sa.select(jobs.c.id, reports.c.report)
            .join(jobs, jobs.c.number == reports.c.job)
            .where(reports.c.number.in_(newest))
        )
        with self._database.reading() as connection:
            return {job_id: job_pb2.Report.FromString(line) for job_id, line in connection.execute(query)}

    def _read(self, query: sa.Select[Any]) -> list[Job]:
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
            histories: dict[int, list[StateChange]] = {row.number: [] for row in rows}
            same = query.with_only_columns(jobs.c.number).order_by(None)
            for change in connection.execute(
                sa.select(history).where(history.c.job.in_(same)).order_by(history.c.place)
            ):
                histories[change.job].append(change_of(change))
        return [job_of(row, tuple(histories[row.number])) for row in rows]


def _key(owner: str, request_id: str) -> str:
    """Request ids are each owner's own: nobody is given another's job for repeating its id. No name holds a newline."""
    return f"{owner}\n{request_id}" if owner else request_id
