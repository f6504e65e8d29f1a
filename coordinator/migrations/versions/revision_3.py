"""Tokens of the people and programs that call the coordinator."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "3"
down_revision = "2"

WIDE = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "tokens",
        sa.Column("number", WIDE, primary_key=True, autoincrement=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("digest", sa.Text, nullable=False, unique=True),
        sa.Column("created_microseconds", WIDE, nullable=False),
        sa.Column("expires_microseconds", WIDE),
        sa.Column("revoked_microseconds", WIDE),
        sqlite_autoincrement=True,
    )
