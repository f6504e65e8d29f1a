"""Owner, priority and labels of jobs, when their files go, and how often the store was opened."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "2"
down_revision = "1"

WIDE = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table("openings", sa.Column("number", WIDE, nullable=False))
    op.execute("INSERT INTO openings (number) VALUES (0)")
    op.add_column("jobs", sa.Column("owner", sa.Text, nullable=False, server_default=""))
    op.add_column("jobs", sa.Column("priority", sa.Integer, nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("expires_microseconds", WIDE))
    op.create_index("jobs_by_owner", "jobs", ["owner"])
    op.create_index("jobs_by_expiry", "jobs", ["expires_microseconds"])
    op.create_table(
        "labels",
        sa.Column("job", WIDE, sa.ForeignKey("jobs.number"), primary_key=True),
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
        sa.Index("labels_by_value", "name", "value"),
    )
