"""The tables of the store, as they are today.

Rules: HEAD is the newest revision under migrations/versions, and these tables are what the revisions up to it make of
an empty database (a test holds them together). Times are whole microseconds since 1970 UTC.
"""

from __future__ import annotations

import sqlalchemy as sa

HEAD = "3"
REVISIONS = ("1", "2", "3")  # oldest first; a store at any other was written by another version

# 64 bits everywhere: SQLite's INTEGER has them, and numbers its rows by itself only under that name.
WIDE = sa.BigInteger().with_variant(sa.Integer, "sqlite")

tables = sa.MetaData()

# Read before anything else, and written by Alembic when it migrates.
revision = sa.Table("alembic_version", tables, sa.Column("version_num", sa.String(32), primary_key=True))

# One row that counts the coordinators that have opened this store: one that lost its lock sees whether another came.
openings = sa.Table("openings", tables, sa.Column("number", WIDE, nullable=False))

jobs = sa.Table(
    "jobs",
    tables,
    sa.Column("number", WIDE, primary_key=True, autoincrement=True),  # the order of submission
    sa.Column("id", sa.Text, nullable=False, unique=True),
    sa.Column("spec", sa.LargeBinary, nullable=False),
    sa.Column("state", sa.Text, nullable=False, index=True),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("queue_position", sa.Integer, nullable=False),
    sa.Column("token_digest", sa.Text),
    sa.Column("pid", sa.Integer),
    sa.Column("start_ticks", WIDE),
    sa.Column("summary", sa.LargeBinary),
    sa.Column("owner", sa.Text, nullable=False, server_default=""),
    sa.Column("priority", sa.Integer, nullable=False, server_default="0"),
    sa.Column("expires_microseconds", WIDE),  # when the files of an ended job are removed; null: never, or done
    sa.Index("jobs_by_owner", "owner"),
    sa.Index("jobs_by_expiry", "expires_microseconds"),
    sqlite_autoincrement=True,
)
history = sa.Table(
    "history",
    tables,
    sa.Column("job", WIDE, sa.ForeignKey("jobs.number"), primary_key=True),
    sa.Column("place", sa.Integer, primary_key=True),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("time_microseconds", WIDE, nullable=False),
)
reports = sa.Table(
    "reports",
    tables,
    sa.Column("number", WIDE, primary_key=True, autoincrement=True),
    sa.Column("job", WIDE, sa.ForeignKey("jobs.number"), nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("step", WIDE, nullable=False),
    sa.Column("report", sa.LargeBinary, nullable=False),
    sa.Index("reports_by_step", "job", "step"),
    sa.Index("reports_by_number", "job", "number"),
    sqlite_autoincrement=True,
)
requests = sa.Table(
    "requests",
    tables,
    sa.Column("request_id", sa.Text, primary_key=True),
    sa.Column("job", WIDE, sa.ForeignKey("jobs.number"), nullable=False),
)
labels = sa.Table(
    "labels",
    tables,
    sa.Column("job", WIDE, sa.ForeignKey("jobs.number"), primary_key=True),
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
    sa.Index("labels_by_value", "name", "value"),
)
tokens = sa.Table(
    "tokens",
    tables,
    sa.Column("number", WIDE, primary_key=True, autoincrement=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("role", sa.Text, nullable=False),
    sa.Column("digest", sa.Text, nullable=False, unique=True),
    sa.Column("created_microseconds", WIDE, nullable=False),
    sa.Column("expires_microseconds", WIDE),  # null: never
    sa.Column("revoked_microseconds", WIDE),  # null: not
    sqlite_autoincrement=True,
)
