"""The beats of ranks on other hosts, as these hosts last sent them.

The lowest rank of each host sends its host's beats to the others in a datagram, as often as its watchdog looks, and
leaves what it hears where all ranks of its host can read it.

Rules: nobody waits for a datagram. Where none comes, what was last heard stays, and of a rank never heard of only host
and number are known. What does not bear the job's token is another job's and ignored. Times travel as ages, for hosts
have clocks of their own.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import Sequence
from time import monotonic

import numpy as np

from worker.beat import ALIVE, FIELDS, PROCESS, RANK, SINCE, Seen, read
from worker.sync.host_address import own_addresses
from worker.sync.node import Node
from worker.sync.world import World

TOKEN_BYTES = 16
MOST_BYTES = 65507  # in a datagram
TIMES = [SINCE, ALIVE]


def pack(token: bytes, segments: Sequence[np.ndarray], now: float) -> bytes:
    """A datagram with beats, each (FIELDS,) float64."""
    rows = np.array(segments, "<f8")
    rows[:, TIMES] = now - rows[:, TIMES]
    return token + rows.tobytes()


def unpack(token: bytes, data: bytes, ranks: int, now: float) -> np.ndarray | None:
    """The beats (n, FIELDS) in a datagram of this job, which has so many ranks; None where it is not one."""
    body = data[len(token) :]
    if not secrets.compare_digest(data[: len(token)], token) or not body or len(body) % (8 * FIELDS):
        return None
    rows = np.frombuffer(body, "<f8").reshape(-1, FIELDS).copy()
    if not np.isfinite(rows).all() or rows[:, RANK].min() < 0 or rows[:, RANK].max() >= ranks:
        return None
    rows[:, TIMES] = now - rows[:, TIMES]
    return rows


class DistantBeats:
    """What this host knows of the ranks of others."""

    def __init__(self, world: World, node: Node, own: Sequence[np.ndarray]) -> None:
        """`own`: the beats of this host's ranks, which share `node`. Collective over all ranks."""
        self._own = own
        self._ranks = world.size
        self._heard = node.shared(world.size * FIELDS, np.float64).reshape(world.size, FIELDS)
        self._token = bytes.fromhex(world.broadcast(secrets.token_hex(TOKEN_BYTES) if world.rank == 0 else None))
        self._socket: socket.socket | None = None
        places: list[list[str | int]] = []
        if node.rank == 0:
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
            self._socket.bind(("", 0))
            places = [[address, self._socket.getsockname()[1]] for address in own_addresses()]
        mine = {place[0] for place in places}
        everyones = world.gather_everywhere(places)
        # All addresses of each: which of them reaches it is not worth a trial. One that this host has too does not.
        self._others = [(host, port) for others in everyones for host, port in others if host not in mine]
        self.exchange()

    def exchange(self) -> None:
        """Send this host's beats and take in what others have sent; waits for nothing."""
        if self._socket is None:
            return
        data = pack(self._token, self._own, monotonic())
        for place in self._others:
            with contextlib.suppress(OSError):  # unreachable, or no room to send it in: the next one is due soon
                self._socket.sendto(data, place)
        with contextlib.suppress(OSError):  # nothing more to read, or an answer of a host that is not there
            while True:
                rows = unpack(self._token, self._socket.recv(MOST_BYTES), self._ranks, monotonic())
                for row in rows if rows is not None else ():
                    self._heard[int(row[RANK])] = row

    def seen(self) -> list[Seen]:
        """Those that were ever heard of, lowest first."""
        return [read(row) for row in self._heard if row[PROCESS]]

    def close(self) -> None:
        """Hear and send no more."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
