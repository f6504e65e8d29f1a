"""What compression cost and saved on one rank, and whether it paid: measured while the run goes on.

Rules: the bandwidth is the best seen, at the start or in any one step, because what a step waits for its peers is no
fault of the network; so savings are rather understated. With parameter servers it is seen at the start and where whole
weights are taken, and never in a step, which is servers' work too. Coding time is this rank's own, and that of servers
while it waits for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np

TRIAL_BYTES = 256 << 10  # 20 ms at 100 Mbit/s
FIRST_TRIAL_BYTES = 4 << 10
FEWEST_TRIALS, MOST_TRIALS, BUDGET_SECONDS = 3, 64, 0.3  # the best of many: on a busy machine most are disturbed


class Costs:
    """Seconds and bytes of one rank's exchange since it was opened."""

    def __init__(self, bytes_per_second: float = 0.0) -> None:
        """`bytes_per_second`: as far as it is known at the start."""
        self.sent_bytes = 0
        self.float32_bytes = 0  # what float32 would have sent
        self.coding_seconds = 0.0
        self._bandwidth = bytes_per_second

    @contextmanager
    def coding(self) -> Iterator[None]:
        """What is done in the block is encoding or decoding."""
        began = perf_counter()
        yield
        self.coding_seconds += perf_counter() - began

    def sent(self, count: int, seconds: float, float32_bytes: int) -> None:
        """`count` bytes travelled, within `seconds` (coding left out), in the place of `float32_bytes`."""
        self.sent_bytes += count
        self.float32_bytes += float32_bytes
        if seconds > 0:
            self._bandwidth = max(self._bandwidth, count / seconds)

    def facts(self, wire_format: str) -> dict[str, Any]:
        """For summary.json; the names are the contract's."""
        saved = (self.float32_bytes - self.sent_bytes) / self._bandwidth if self._bandwidth else 0.0
        return {
            "wire_format": wire_format,
            "sent_bytes": self.sent_bytes,
            "float32_bytes": self.float32_bytes,
            "coding_seconds": self.coding_seconds,
            "bytes_per_second": self._bandwidth,
            "saved_seconds": saved,
            "compression_paid": saved > self.coding_seconds,
        }


class CompressionCosts(Costs):
    """Of an exchange among peers, which send each other as much as they take."""

    def __init__(self, peers: Any) -> None:
        """`peers`: communicator of those who exchange a slice. Collective among them."""
        super().__init__(_measured_bandwidth(peers))
        size = peers.Get_size()
        self.last_sent_bytes = 0  # of the last step
        self._share = 2 * (size - 1) / size  # of a vector, that an all-reduce sends from each peer
        self._began = self._coding_before = 0.0

    def begin(self) -> None:
        """A step's exchange begins."""
        self._began, self._coding_before = perf_counter(), self.coding_seconds

    def end(self, sent: int, elements: int) -> None:
        """The exchange of `elements` is over, in which `sent` bytes left this rank."""
        seconds = perf_counter() - self._began - (self.coding_seconds - self._coding_before)
        self.last_sent_bytes = sent
        self.sent(sent, seconds, self.all_reduced(elements))

    def all_reduced(self, elements: int) -> int:
        """Bytes that leave each rank in an all-reduce of so many float32 elements, in the fewest way there is."""
        return int(4 * elements * self._share)


def _measured_bandwidth(peers: Any) -> float:
    """Bytes/s that each peer sends to the next while it receives as many, the same on all."""
    rank, size = peers.Get_rank(), peers.Get_size()
    outgoing, incoming = np.zeros(TRIAL_BYTES, np.uint8), np.zeros(TRIAL_BYTES, np.uint8)

    def send(count: int) -> None:
        to, source = (rank + 1) % size, (rank - 1) % size
        peers.Sendrecv(outgoing[:count], to, recvbuf=incoming[:count], source=source)

    return best_bandwidth(send, lambda seconds: max(peers.allgather(seconds)))


def best_bandwidth(send: Callable[[int], None], agree: Callable[[float], float] = float) -> float:
    """Bytes/s of `send`, which returns when so many bytes have come to the other side: the best of trials that grow.

    They grow so that a network of 1 Mbit/s is not kept busy for seconds. A slow one ends nothing before the time is
    used up: on a busy machine most are slow, because a process waits for its turn, and the network is none the slower.

    Args:
        agree: the seconds that count where several measure together, and must make as many trials.
    """
    send(1)  # wakes whoever takes part
    agree(0.0)
    best, spent, size = 0.0, 0.0, FIRST_TRIAL_BYTES
    for trial in range(1, MOST_TRIALS + 1):
        began = perf_counter()
        send(size)
        taken = agree(perf_counter() - began)
        best, spent, size = max(best, size / taken), spent + taken, min(4 * size, TRIAL_BYTES)
        if trial >= FEWEST_TRIALS and spent > BUDGET_SECONDS:
            break
    return best


def uncompressed(wire_format: str) -> dict[str, Any]:
    """The facts of a job that asks for a lossy format where there is nobody to send to."""
    return {"wire_format": wire_format, "sent_bytes": 0, "float32_bytes": 0}


def line(facts: dict[str, Any]) -> str | None:
    """What people should know of it at the end of a job; None where nothing was asked for."""
    kind = facts.get("wire_format", "float32")
    if kind == "float32":
        return None
    if not facts["float32_bytes"]:
        return f"wire format {kind}: nothing was compressed, because there is one node alone or no step was made"
    ratio = facts["float32_bytes"] / max(1, facts["sent_bytes"])
    verdict = "it paid" if facts["compression_paid"] else "it cost more than it saved: use wire_format: float32 here"
    return (
        f"wire format {kind}: sent {_bytes(facts['sent_bytes'])} where float32 sends {_bytes(facts['float32_bytes'])} "
        f"({ratio:.1f} times less); coding took {facts['coding_seconds']:.3g} s and saved about "
        f"{facts['saved_seconds']:.3g} s at the {_bytes(facts['bytes_per_second'])}/s measured: {verdict}"
    )


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"
