"""The store of paceline 0.1: jobs, history, reports, requests.

Rules: a revision that has been released is never changed, nor does it import the tables of today.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "1"
down_revision = None

WIDE = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "jobs",
        sa.Column("number", WIDE, primary_key=True, autoincrement=True),
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
        sqlite_autoincrement=True,
    )
    op.create_table(
        "history",
        sa.Column("job", WIDE, sa.ForeignKey("jobs.number"), primary_key=True),
        sa.Column("place", sa.Integer, primary_key=True),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("time_microseconds", WIDE, nullable=False),
    )
    op.create_table(
        "reports",
        sa.Column("number", WIDE, primary_key=True, autoincrement=True),
        sa.Column("job", WIDE, sa.ForeignKey("jobs.number"), nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("step", WIDE, nullable=False),
        sa.Column("report", sa.LargeBinary, nullable=False),
        sa.Index("reports_by_step", "job", "step"),
        sa.Index("reports_by_number", "job", "number"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "requests",
        sa.Column("request_id", sa.Text, primary_key=True),
        sa.Column("job", WIDE, sa.ForeignKey("jobs.number"), nullable=False),
    )
