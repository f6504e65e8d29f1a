"""The database behind the store: SQLite in a file or PostgreSQL, with today's tables, for one coordinator alone.

Rules: whoever writes holds the store. With PostgreSQL that is an advisory lock of the very session that writes, so a
coordinator whose session died cannot write before it has the lock again, and never after another has opened the store;
a SQLite file lies in a state folder, whose lock holds it. Alembic is imported only when there is something to migrate.
A fault of the database ends the call with StoreUnavailable and nothing else: the next call tries anew.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from coordinator import schema

WAIT_SECONDS = 10  # for a connection, a statement, or another program that reads the SQLite file
CLAIM_SECONDS = 3  # for the session of a coordinator that was just killed to end
LOCK_KEY = 0x70616365  # of the advisory lock, "pace"; PostgreSQL keeps these apart by database
READERS = 16  # connections that read from PostgreSQL at once; others wait their turn
_OWN_MISTAKES = (sa.exc.IntegrityError, sa.exc.ProgrammingError, sa.exc.DataError)


class StoreUnusable(Exception):
    """No coordinator can begin with this store; the message says why and what to do."""


class StoreUnavailable(Exception):
    """The database does not answer, or not this coordinator, or refuses to write; what was asked may be asked again."""


def sqlite_at(path: Path) -> sa.URL:
    return sa.URL.create("sqlite", database=str(path))


def read_store(text: str) -> sa.URL:
    """The database a person named: `postgresql://USER:PASSWORD@HOST:PORT/DATABASE`. ValueError says what is wrong."""
    try:
        url = sa.make_url(text)
    except (sa.exc.ArgumentError, ValueError):
        raise ValueError("it is not a URL such as postgresql://USER@HOST/DATABASE") from None
    if url.drivername not in ("postgresql", "postgres"):
        raise ValueError(
            f"{url.drivername!r} is not postgresql; without --store, jobs are kept in SQLite in the --state folder"
        )
    return url.set(drivername="postgresql+psycopg")


class Database:
    """The open database. Any thread may read and write; writes are one at a time.

    beside: for a command that writes for a moment, whether or not a coordinator holds the store meanwhile; it finds
    today's tables there, or brings them up to date as a coordinator would.
    """

    def __init__(self, url: sa.URL, beside: bool = False) -> None:
        self._beside = beside
        self._is_file = url.get_backend_name() == "sqlite"
        self.name = url.database if self._is_file else url.set(drivername="postgresql").render_as_string()
        self._lock = threading.Lock()
        self._writer: sa.Connection | None = None
        self._opening: int | None = None
        self._engine = self._create(url)
        try:
            with self._lock:
                self._writer = self._claim()
        except StoreUnavailable as fault:
            self._engine.dispose()
            raise StoreUnusable(str(fault)) from fault
        except (sa.exc.DBAPIError, StoreUnusable) as fault:
            self._engine.dispose()
            if isinstance(fault, StoreUnusable):
                raise
            raise StoreUnusable(f"{self.name} cannot be used as a job store: {_words(fault)}") from fault

    def close(self) -> None:
        with self._lock:
            self._drop_writer()
        self._engine.dispose()

    @contextlib.contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A connection that sees one moment of the database."""
        with self._plain_words(), self._engine.connect() as connection:
            yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction that is on disk when the block has ended, or has not happened.

        StoreUnavailable: it has not, unless the database went away while it answered; then nobody knows.
        """
        with self._plain_words(), self._lock:
            try:
                connection = self._held()
                with connection.begin():
                    yield connection
            except sa.exc.DBAPIError:
                self._drop_writer()
                raise

    # ------------------------------------------------------------------------------------------------------- opening

    def _create(self, url: sa.URL) -> sa.Engine:
        if self._is_file:
            engine = sa.create_engine(url, connect_args={"timeout": WAIT_SECONDS}, max_overflow=-1)
            sa.event.listen(engine, "connect", _prepare_sqlite)
            sa.event.listen(engine, "begin", _begin_sqlite)
            return engine
        settings = {
            "statement_timeout": WAIT_SECONDS * 1000,
            "lock_timeout": CLAIM_SECONDS * 1000,
            # A coordinator whose machine vanished lets go of the store within half a minute.
            "tcp_keepalives_idle": 10,
            "tcp_keepalives_interval": 5,
            "tcp_keepalives_count": 3,
        }
        arguments = {
            "connect_timeout": WAIT_SECONDS,
            "application_name": f"paceline on {socket.gethostname()}, pid {os.getpid()}"[:63],
            "options": " ".join(f"-c {name}={value}" for name, value in settings.items()),
        }
        try:
            return sa.create_engine(
                url,
                connect_args={**arguments, **url.query},
                isolation_level="REPEATABLE READ",
                pool_pre_ping=True,
                pool_size=READERS,
                max_overflow=0,
                pool_timeout=WAIT_SECONDS,
            )
        except ModuleNotFoundError as fault:
            raise StoreUnusable(f"{self.name} needs {fault.name}: pip install 'paceline[postgres]'") from fault

    def _held(self) -> sa.Connection:
        """The connection that may write, opened anew where its session has died."""
        if self._writer is not None and not self._is_file:
            try:
                self._engine.dialect.do_ping(self._writer.connection.dbapi_connection)  # type: ignore[arg-type]
            except (sa.exc.DBAPIError, self._engine.dialect.loaded_dbapi.Error):
                self._drop_writer()
        if self._writer is None:
            self._writer = self._claim()
        return self._writer

    def _drop_writer(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            with contextlib.suppress(sa.exc.SQLAlchemyError):
                writer.invalidate()  # closes the session, and with it the lock
            with contextlib.suppress(sa.exc.SQLAlchemyError):
                writer.close()

    def _claim(self) -> sa.Connection:
        connection = self._engine.connect().execution_options(paceline_writes=True)
        try:
            if self._beside and self._is_current(connection):
                return connection
            if not self._is_file:
                self._take_lock(connection)
            with connection.begin():
                if self._beside:
                    self._bring_up_to_date(connection)
                elif self._opening is None:
                    self._bring_up_to_date(connection)
                    count = sa.update(schema.openings).values(number=schema.openings.c.number + 1)
                    self._opening = connection.execute(count.returning(schema.openings.c.number)).scalar_one()
                elif connection.execute(sa.select(schema.openings.c.number)).scalar_one() != self._opening:
                    raise StoreUnavailable(
                        f"another coordinator has opened the job store {self.name} since: stop this one"
                    )
        except BaseException:
            connection.invalidate()
            connection.close()
            raise
        return connection

    def _take_lock(self, connection: sa.Connection) -> None:
        try:
            with connection.begin():
                connection.execute(sa.select(sa.func.pg_advisory_lock(LOCK_KEY)))
        except sa.exc.OperationalError as fault:
            if getattr(fault.orig, "sqlstate", "") != "55P03":  # lock_not_available
                raise
            with connection.begin():
                holder = connection.execute(_HOLDER, {"key": LOCK_KEY}).scalar_one_or_none() or "no longer there"
            raise StoreUnavailable(
                f"another coordinator ({holder}) uses {self.name}: stop it, or give this one another --store"
            ) from fault

    def _is_current(self, connection: sa.Connection) -> bool:
        with connection.begin():
            return self._stored_revision(connection) == schema.HEAD

    def _bring_up_to_date(self, connection: sa.Connection) -> None:
        """Today's tables, in the transaction that is open: made, migrated, or there already."""
        found = self._stored_revision(connection)
        if found is None:
            schema.tables.create_all(connection)
            connection.execute(sa.insert(schema.revision).values(version_num=schema.HEAD))
            connection.execute(sa.insert(schema.openings).values(number=0))
        elif found not in schema.REVISIONS:
            raise StoreUnusable(
                f"{self.name} was written by another version of paceline (schema {found}, this one has "
                f"{schema.HEAD}): use that version or another store"
            )
        elif found != schema.HEAD:
            if not self._is_file:  # a large table takes its time
                connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
            migrate(connection, schema.HEAD)
        if self._is_file:  # what paceline 0.1 reads, so that it leaves a newer file alone
            connection.exec_driver_sql(f"PRAGMA user_version = {int(schema.HEAD)}")

    def _stored_revision(self, connection: sa.Connection) -> str | None:
        """None for an empty database."""
        names = sa.inspect(connection).get_table_names()
        if schema.revision.name in names:
            return str(connection.execute(sa.select(schema.revision.c.version_num)).scalar_one())
        if self._is_file and (version := connection.exec_driver_sql("PRAGMA user_version").scalar_one()):
            if version == 1:  # before there were revisions
                schema.revision.create(connection)
                connection.execute(sa.insert(schema.revision).values(version_num="1"))
            return str(version)
        if schema.jobs.name in names:
            raise StoreUnusable(f"{self.name} holds a table `jobs` that is not paceline's: use a database of its own")
        return None

    # -------------------------------------------------------------------------------------------------------- faults

    @contextlib.contextmanager
    def _plain_words(self) -> Iterator[None]:
        try:
            yield
        except _OWN_MISTAKES:
            raise
        except sa.exc.DBAPIError as fault:
            raise StoreUnavailable(f"the job store {self.name} cannot be used now: {_words(fault)}") from fault
        except sa.exc.TimeoutError as fault:
            raise StoreUnavailable(f"the job store {self.name} is too busy: {READERS} calls read from it") from fault


def migrate(connection: sa.Connection, revision: str) -> None:
    """Bring the tables to a revision, in the transaction of the connection."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


_HOLDER = sa.text(
    "SELECT application_name FROM pg_stat_activity JOIN pg_locks USING (pid) WHERE locktype = 'advisory' AND granted"
    " AND classid = 0 AND objid = :key AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    " LIMIT 1"
)


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    """WAL lets readers and the writer work side by side; FULL puts every commit on disk before it returns."""
    connection.isolation_level = None  # transactions begin where we say, not where sqlite3 thinks
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: sa.Connection) -> None:
    # A writer takes the file's write lock at once: between its reading and its writing nobody else may write.
    writes = connection.get_execution_options().get("paceline_writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


# What SQLite says that a person must put right, and how.
_REMEDIES = {
    "database or disk is full": "make room on its disk",
    "disk I/O error": "look at its disk",
    "attempt to write a readonly database": "make it writable for the user the coordinator runs as",
    "unable to open database file": "see that its folder is there and writable",
    "database disk image is malformed": "bring it back from a backup, or move it away to begin without these jobs",
    "file is not a database": "bring it back from a backup, or move it away to begin anew",
}


def _words(fault: Any) -> str:
    """What the database said, on one line, and what to do about it where that is known."""
    words = " ".join(str(fault.orig or fault).split())
    return f"{words}: {_REMEDIES[words]}" if words in _REMEDIES else words
