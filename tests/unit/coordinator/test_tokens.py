"""Tokens in the store: the same in SQLite and in PostgreSQL, beside a coordinator that has it open."""

from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from coordinator import auth
from coordinator.database import Database, read_store, sqlite_at
from coordinator.store import Store
from coordinator.tokens import Role, TokenInvalid, Tokens, read_duration, read_role


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> sa.URL:
    if request.param == "sqlite":
        return sqlite_at(tmp_path / "paceline.sqlite")
    return read_store(request.getfixturevalue("postgres").new_database())


def test_a_token_made_before_and_beside_a_coordinator_is_seen_by_it_and_the_coordinator_goes_on(
    url, noon, make_job
) -> None:
    first = Database(url, beside=True)
    before = Tokens(first).create("ada", Role.ADMINISTRATOR, None, noon)
    first.close()
    store = Store(url)
    beside = Database(url, beside=True)
    during = Tokens(beside).create("bob", Role.VIEWER, noon + timedelta(days=1), noon)
    found = {token.name: token for token in store.tokens.all()}
    assert {name: token.digest for name, token in found.items()} == {
        "ada": auth.digest_of(before),
        "bob": auth.digest_of(during),
    }
    assert (found["bob"].role, found["bob"].created, found["bob"].expires) == (
        Role.VIEWER,
        noon,
        noon + timedelta(days=1),
    )
    Tokens(beside).revoke("bob", noon)
    beside.close()
    assert store.tokens.all()[1].state(noon) == "revoked"
    store.add(make_job())  # it still holds its store
    store.close()


def test_the_secret_is_nowhere_in_the_file(tmp_path, noon) -> None:
    database = Database(sqlite_at(tmp_path / "paceline.sqlite"), beside=True)
    secret = Tokens(database).create("ada", Role.VIEWER, None, noon)
    database.close()
    for path in tmp_path.iterdir():
        assert secret.encode() not in path.read_bytes()


def test_a_name_has_one_live_token_and_a_new_one_when_that_is_over(url, noon) -> None:
    database = Database(url, beside=True)
    tokens = Tokens(database)
    first = tokens.create("ada", Role.SUBMITTER, noon + timedelta(hours=1), noon)
    with pytest.raises(TokenInvalid, match="ada has a token: revoke it first"):
        tokens.create("ada", Role.SUBMITTER, None, noon)
    second = tokens.create("ada", Role.SUBMITTER, None, noon + timedelta(hours=1))
    tokens.revoke("ada", noon + timedelta(hours=1))
    third = tokens.create("ada", Role.SUBMITTER, None, noon + timedelta(hours=1))
    assert len({first, second, third}) == 3
    with pytest.raises(TokenInvalid, match="'bob' has no token to revoke"):
        tokens.revoke("bob", noon)
    database.close()


@pytest.mark.parametrize("name", ["", "-x", "a b", "a\nb", "a/b", "x" * 64, "é"])
def test_a_name_that_could_be_taken_for_something_else_is_refused(tmp_path, noon, name) -> None:
    database = Database(sqlite_at(tmp_path / "paceline.sqlite"), beside=True)
    with pytest.raises(TokenInvalid, match="is no name for a token"):
        Tokens(database).create(name, Role.VIEWER, None, noon)
    database.close()


def test_request_ids_are_each_owners_own(tmp_path, make_job) -> None:
    store = Store(sqlite_at(tmp_path / "paceline.sqlite"))
    for owner in ("", "ada", "bob"):
        store.add(make_job(f"digits-00000{len(owner)}" if owner != "bob" else "digits-00000b", owner=owner), "once")
    assert [store.request("once", owner).owner for owner in ("", "ada", "bob")] == ["", "ada", "bob"]
    assert store.request("once", "eve") is None
    store.close()


@pytest.mark.parametrize(
    ("text", "time"),
    [("30d", timedelta(days=30)), ("12h", timedelta(hours=12)), ("45m", timedelta(minutes=45))],
)
def test_times_are_whole_days_hours_or_minutes(text, time) -> None:
    assert read_duration(text) == time


@pytest.mark.parametrize("text", ["0d", "-1d", "1", "1w", "1.5h", "999999d", " 1d"])
def test_other_times_are_refused(text) -> None:
    with pytest.raises(TokenInvalid, match="is no time such as 30d"):
        read_duration(text)


def test_an_unknown_role_is_refused_with_those_there_are() -> None:
    with pytest.raises(TokenInvalid, match="--role 'admin' is not one of: viewer, submitter, administrator"):
        read_role("admin")
