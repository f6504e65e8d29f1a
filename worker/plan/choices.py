"""Ways of exchanging: what a job may choose, and what each choice does to the result."""

from __future__ import annotations

from enum import IntEnum
from typing import Final, NamedTuple

from worker.plan.machine import FLOAT32_BYTES


class Change(IntEnum):
    """What a choice does to the result."""

    NOTHING = 0  # the weights are those of one rank
    ROUNDING = 1  # less is sent than was computed; what was left out is sent later
    COURSE = 2  # the ranks train apart for some steps: another path through the weights


class WireFormat(NamedTuple):
    """How a vector travels."""

    name: str
    bytes_per_element: float
    encode_each: float  # seconds an element, with what is kept of its error
    decode_each: float
    sums_well: bool  # a sum is encoded once more; where not, every node sends all it has to every other
    change: Change = Change.ROUNDING
    answer: WireFormat | None = None  # in which a parameter server's answers travel, where it is another
    # Of a format that travels as float32 all-reduces, one after another: the elements of each over those of the vector.
    # No server takes it, and `encode_each` is all of its coding before the last sum, `decode_each` what follows.
    factors: tuple[float, ...] = ()


FLOAT32: Final = WireFormat("float32", float(FLOAT32_BYTES), 0.0, 0.0, True, Change.NOTHING)


class Choice(NamedTuple):
    """A way of exchanging."""

    kind: str  # all_reduce, parameter_server or local
    wire: WireFormat = FLOAT32
    servers: int = 1  # shards of the parameter server
    steps: int = 1  # between two exchanges

    @property
    def change(self) -> Change:
        """What it does to the result."""
        return Change.COURSE if self.kind == "local" else self.wire.change

    @property
    def name(self) -> str:
        """For a table."""
        if self.kind == "local":
            return f"local steps of {self.steps}"
        name = "all-reduce" if self.kind == "all_reduce" else "parameter server"
        if self.servers > 1:
            name += f", {self.servers} shards"
        return name if self.wire == FLOAT32 else f"{name}, {self.wire.name}"
