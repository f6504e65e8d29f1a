"""The tokens of the people and programs that call the coordinator: made, listed, revoked, in its database.

Rules: the secret is given out once and never stored, only its SHA-256. A row is never removed, so that a name that was
revoked stays known as such. One live token for a name, which is also whose jobs are meant.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from enum import StrEnum
from typing import NamedTuple

import sqlalchemy as sa

from coordinator import auth
from coordinator.database import Database
from coordinator.rows import microseconds, time_of
from coordinator.schema import tokens
from protos.wording import not_one_of, quoted

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}")
_DURATION = re.compile(r"([1-9][0-9]{0,4})([mhd])")
_MINUTES = {"m": 1, "h": 60, "d": 24 * 60}


class Role(StrEnum):
    """What its holder may do: permissions.RULES says for each call."""

    VIEWER = "viewer"
    SUBMITTER = "submitter"
    ADMINISTRATOR = "administrator"


class TokenInvalid(Exception):
    """What was asked for a token cannot be; the message says why."""


class StoredToken(NamedTuple):
    name: str
    role: Role
    digest: str
    created: datetime
    expires: datetime | None
    revoked: datetime | None

    def state(self, now: datetime) -> str:
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else "live"


class Tokens:
    """Any thread may call; StoreUnavailable where the database does not answer."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, name: str, role: Role, expires: datetime | None, now: datetime) -> str:
        """Store a new token and return its secret. TokenInvalid for a bad name, or one that has a live token."""
        if NAME.fullmatch(name) is None:
            raise TokenInvalid(
                f"{quoted(name)} is no name for a token: letters, digits and . _ @ -, 63 at most, the first no sign"
            )
        token = auth.new_token()
        with self._database.writing() as connection:
            held = connection.execute(sa.select(tokens).where(tokens.c.name == name))
            if any(_token_of(row).state(now) == "live" for row in held):
                raise TokenInvalid(f"{name} has a token: revoke it first (paceline token revoke {name})")
            row = {
                "name": name,
                "role": role.value,
                "digest": token.digest,
                "created_microseconds": microseconds(now),
                "expires_microseconds": None if expires is None else microseconds(expires),
            }
            connection.execute(sa.insert(tokens).values(row))
        return token.secret

    def revoke(self, name: str, now: datetime) -> None:
        """From now on the name's token is refused. TokenInvalid where there is none to revoke."""
        with self._database.writing() as connection:
            live = sa.and_(tokens.c.name == name, tokens.c.revoked_microseconds.is_(None))
            revoked = sa.update(tokens).where(live).values(revoked_microseconds=microseconds(now))
            if connection.execute(revoked).rowcount == 0:
                raise TokenInvalid(
                    f"{quoted(name)} has no token to revoke; `paceline token list` shows those there are"
                )

    def all(self) -> list[StoredToken]:
        """Every token there ever was, oldest first."""
        with self._database.reading() as connection:
            return [_token_of(row) for row in connection.execute(sa.select(tokens).order_by(tokens.c.number))]


def read_role(text: str) -> Role:
    """TokenInvalid for what is none."""
    if text not in list(Role):
        raise TokenInvalid(f"--role {not_one_of(text, list(Role))}")
    return Role(text)


def read_duration(text: str) -> timedelta:
    """`30d`, `12h`, `45m`. TokenInvalid for anything else."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise TokenInvalid(f"--expires: {quoted(text)} is no time such as 30d, 12h or 45m")
    return timedelta(minutes=int(match[1]) * _MINUTES[match[2]])


def _token_of(row: sa.Row[tuple[object, ...]]) -> StoredToken:
    def time(value: int | None) -> datetime | None:
        return None if value is None else time_of(value)

    return StoredToken(
        row.name,
        Role(row.role),
        row.digest,
        time_of(row.created_microseconds),
        time(row.expires_microseconds),
        time(row.revoked_microseconds),
    )
