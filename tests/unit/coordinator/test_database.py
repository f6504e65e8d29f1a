"""Opening a store: its schema in every version, its one coordinator, and its absence."""

import contextlib
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

import coordinator.database
from coordinator import jobs, schema
from coordinator.database import Database, StoreUnavailable, StoreUnusable, migrate, read_store, sqlite_at
from coordinator.jobs import advance
from coordinator.store import Store


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "paceline.sqlite"


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, path: Path) -> sa.URL:
    return (
        sqlite_at(path) if request.param == "sqlite" else read_store(request.getfixturevalue("postgres").new_database())
    )


@pytest.fixture
def engine(url: sa.URL) -> Iterator[sa.Engine]:
    """Past the store, as another program."""
    engine = sa.create_engine(url)
    yield engine
    engine.dispose()


def shape(engine: sa.Engine) -> object:
    """Tables, columns, keys and indexes, as the database itself tells them."""
    found = sa.inspect(engine)
    return {
        table: (
            [(column["name"], str(column["type"]), column["nullable"], column["default"]) for column in columns],
            found.get_pk_constraint(table)["constrained_columns"],
            sorted(str(index["column_names"]) + str(index["name"]) for index in found.get_indexes(table)),
            sorted(str(key["constrained_columns"]) for key in found.get_foreign_keys(table)),
        )
        for table in sorted(found.get_table_names())
        if (columns := found.get_columns(table))
    }


def test_the_newest_revision_is_the_one_the_store_asks_for() -> None:
    scripts = ScriptDirectory(str(Path(coordinator.database.__file__).parent / "migrations"))
    assert [script.revision for script in scripts.walk_revisions()] == list(reversed(schema.REVISIONS))
    assert schema.REVISIONS[-1] == schema.HEAD


def test_migrations_make_the_tables_that_a_new_store_has(url, engine, request, tmp_path) -> None:
    with engine.begin() as connection:
        migrate(connection, schema.HEAD)
        assert compare_metadata(MigrationContext.configure(connection), schema.tables) == []
    migrated = shape(engine)
    if url.get_backend_name() == "sqlite":
        fresh = sqlite_at(tmp_path / "fresh.sqlite")
    else:
        fresh = read_store(request.getfixturevalue("postgres").new_database())
    Store(fresh).close()
    other = sa.create_engine(fresh)
    assert shape(other) == migrated
    other.dispose()


def test_a_store_of_the_first_version_is_migrated_with_every_job_in_it(path, make_job, noon) -> None:
    with sqlite3.connect(path) as connection:
        connection.executescript((Path(__file__).parent / "store_of_0_1.sql").read_text())
    connection.close()
    store = Store(sqlite_at(path))
    (job,) = store.open_jobs()
    assert (job.id, job.state, job.owner, job.spec.priority, job.history[0].time) == (
        "digits-000000", "RUNNING", "", 0, noon
    )  # fmt: skip
    assert store.request("once") == job
    store.save(advance(job, jobs.CancelAsked(), noon))
    store.close()
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (int(schema.HEAD),)
    connection.close()


def test_a_migration_that_fails_leaves_the_store_as_it_was(path, monkeypatch) -> None:
    def content() -> list[str]:
        with contextlib.closing(sqlite3.connect(path)) as connection:
            return [*connection.iterdump(), str(connection.execute("PRAGMA user_version").fetchone())]

    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript((Path(__file__).parent / "store_of_0_1.sql").read_text())
    before = content()

    def fail(connection: sa.Connection, revision: str) -> None:
        migrate(connection, revision)
        connection.exec_driver_sql("SELECT * FROM nowhere")

    monkeypatch.setattr(coordinator.database, "migrate", fail)
    with pytest.raises(StoreUnusable, match="no such table: nowhere"):
        Store(sqlite_at(path))
    assert content() == before


def test_a_store_that_is_up_to_date_opens_without_alembic(url, monkeypatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "alembic"]:
        monkeypatch.setitem(sys.modules, name, None)  # so that importing it raises
    for _ in range(2):
        Store(url).close()


def test_a_postgresql_store_of_an_older_revision_is_migrated(postgres, make_job) -> None:
    url = read_store(postgres.new_database())
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        migrate(connection, "1")
        columns = "id, spec, state, reason, message, attempt, queue_position"
        values = "'digits-000000', '', 'QUEUED', 'Made', 'made for a test', 0, 0"
        connection.exec_driver_sql(f"INSERT INTO jobs ({columns}) VALUES ({values})")
        columns, values = "job, place, state, reason, message, time_microseconds", "1, 0, 'QUEUED', 'Made', '', 0"
        connection.exec_driver_sql(f"INSERT INTO history ({columns}) VALUES ({values})")
    store = Store(url)
    store.add(make_job("digits-000001"))
    assert [(job.id, job.owner) for job in store.open_jobs()] == [("digits-000000", ""), ("digits-000001", "")]
    store.close()
    engine.dispose()


def test_a_store_of_a_newer_version_is_left_alone_in_one_line(url, engine) -> None:
    Store(url).close()
    with engine.begin() as connection:
        connection.execute(sa.update(schema.revision).values(version_num="99"))
    with pytest.raises(StoreUnusable, match=r"another version of paceline \(schema 99, this one has 3\): use") as fault:
        Store(url)
    assert len(str(fault.value).splitlines()) == 1


def test_a_file_of_a_version_that_had_no_revisions_is_left_alone(path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StoreUnusable, match="another version of paceline \\(schema 99, this one has 3\\)"):
        Store(sqlite_at(path))


def test_a_file_that_is_no_store_is_named(path) -> None:
    path.write_text("not a database, but long enough to look like a file that has a header " * 20)
    with pytest.raises(StoreUnusable, match=r"paceline.sqlite cannot be used as a job store: file is not a database"):
        Store(sqlite_at(path))


def test_a_database_with_a_table_of_someone_elses_is_left_alone(url, engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE jobs (mine TEXT)")
    with pytest.raises(StoreUnusable, match="holds a table `jobs` that is not paceline's"):
        Store(url)


def test_the_file_lets_readers_in_while_it_is_written(path) -> None:
    store = Store(sqlite_at(path))
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()
    store.close()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("no url", "it is not a URL such as postgresql://USER@HOST/DATABASE"),
        ("mysql://here/jobs", "'mysql' is not postgresql"),
        ("sqlite:///jobs.sqlite", "without --store, jobs are kept in SQLite in the --state folder"),
    ],
)
def test_what_is_no_postgresql_database_is_refused(text, fault) -> None:
    with pytest.raises(ValueError, match=fault):
        read_store(text)


def test_a_server_that_is_not_there_is_one_line_without_the_password(tmp_path) -> None:
    pytest.importorskip("psycopg", reason="pip install 'paceline[postgres]'")
    with pytest.raises(StoreUnusable) as fault:
        Store(read_store(f"postgresql://me:secret@/jobs?host={tmp_path}"))
    assert "postgresql://me:***@/jobs" in str(fault.value)
    assert "No such file or directory" in str(fault.value)
    assert "secret" not in str(fault.value)
    assert len(str(fault.value).splitlines()) == 1


def test_a_second_coordinator_on_a_postgresql_database_is_refused_with_the_name_of_the_first(postgres) -> None:
    url = read_store(postgres.new_database())
    first = Store(url)
    with pytest.raises(StoreUnusable, match=r"another coordinator \(paceline on .*, pid \d+\) uses postgresql://"):
        Store(url)
    first.close()
    Store(url).close()


def test_a_restarted_server_is_taken_up_again_and_meanwhile_calls_say_that_it_is_away(postgres, make_job, noon) -> None:
    store = Store(read_store(postgres.new_database()))
    store.add(make_job())
    postgres.stop()
    try:
        with pytest.raises(StoreUnavailable, match=r"the job store postgresql://.* cannot be used now: "):
            store.get("digits-000000")
        with pytest.raises(StoreUnavailable, match=r"the job store postgresql://.* cannot be used now: "):
            store.save(advance(make_job(), jobs.Admitted("digest"), noon))
    finally:
        postgres.start()
    assert store.get("digits-000000") == make_job()
    moved = advance(make_job(), jobs.Admitted("digest"), noon)
    store.save(moved)
    assert store.get("digits-000000") == moved
    postgres.stop()
    postgres.start()
    assert store.get("digits-000000") == moved  # neither reader nor writer notices a restart between two calls
    store.save(advance(moved, jobs.Reported(), noon))
    store.close()


def test_a_coordinator_whose_session_died_never_writes_after_another_has_opened_the_store(postgres, make_job) -> None:
    url = read_store(postgres.new_database())
    first = Store(url)
    first.add(make_job())
    postgres.query(url.database, "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'")
    second = Store(url)
    with pytest.raises(StoreUnavailable, match=r"another coordinator .* uses postgresql://"):
        first.add(make_job("digits-000001"))
    second.close()
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match=r"another coordinator has opened the job store .* since: stop this"):
            first.add(make_job("digits-000001"))
    assert [job.id for job in first.open_jobs()] == ["digits-000000"]
    first.close()


def test_a_fault_in_a_transaction_undoes_it_and_the_next_one_works(url) -> None:
    database = Database(url)

    def count(connection: sa.Connection) -> int:
        return connection.execute(sa.select(sa.func.count()).select_from(schema.requests)).scalar_one()

    def write(then: Callable[[sa.Connection], object]) -> None:
        with database.writing() as connection:
            connection.execute(sa.update(schema.openings).values(number=77))
            then(connection)

    with pytest.raises(KeyError):
        write(lambda _: {}["missing"])
    with pytest.raises(sa.exc.IntegrityError):
        write(lambda connection: connection.execute(sa.insert(schema.requests).values(request_id="once", job=12345)))
    with database.writing() as connection:
        assert count(connection) == 0
        assert connection.execute(sa.select(schema.openings.c.number)).scalar_one() == 1
    database.close()
