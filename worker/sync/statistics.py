"""What the exchange cost one rank, counted from the start of the attempt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class ServerCounts(NamedTuple):
    """What became of a job's parameter servers and of those who push to them; names as in RankReport."""

    parameter_server_restarts: int  # servers that died and came back
    parameter_server_steps_lost: int  # by those, since their snapshots
    parameter_server_workers: int  # that the next step is shared by: nodes and guests
    parameter_server_guests_dropped: int


@dataclass
class ExchangeStatistics:
    """Seconds and payload bytes since the exchange was opened."""

    wait_seconds: float = 0.0  # waiting for other ranks; part of exchange_seconds
    exchange_seconds: float = 0.0  # everything but the optimizer
    update_seconds: float = 0.0  # the optimizer
    sent_bytes: dict[str, int] = field(default_factory=dict)  # by transport
    received_bytes: dict[str, int] = field(default_factory=dict)
    servers: ServerCounts | None = None  # on rank 0 of a job with parameter servers

    def sent(self, transport: str, count: int) -> None:
        """Count `count` payload bytes that left this rank."""
        self.sent_bytes[transport] = self.sent_bytes.get(transport, 0) + count

    def received(self, transport: str, count: int) -> None:
        """Count `count` payload bytes that reached this rank."""
        self.received_bytes[transport] = self.received_bytes.get(transport, 0) + count


@dataclass
class Staleness:
    """How old the weights were that pushes were computed on, in steps."""

    pushes: int = 0
    total_steps: float = 0.0
    most_steps: float = 0.0

    def see(self, steps: float) -> None:
        """One more push."""
        self.pushes += 1
        self.total_steps += steps
        self.most_steps = max(self.most_steps, steps)
