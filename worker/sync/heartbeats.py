"""The beats of the ranks of one machine, in memory they share, and the sentences that say who is late or gone.

Rules: nothing here waits for another rank but `open` and `close`, which are collective; what is read may be read at any
time, from any thread. Of ranks on other machines is known what distant_beats.py has heard, if anything: when all ranks
here are equally far, one of those is late.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic, sleep
from typing import NamedTuple

import numpy as np

from worker.beat import FIELDS, Seen, late, read
from worker.processes import has_ended
from worker.sync.distant_beats import DistantBeats
from worker.sync.node import Node, shared_memory_shortage
from worker.sync.world import World

DEATH_SECONDS = 0.2  # from the end of a rank's connections until its process counts as ended, on a busy machine
LOOK_SECONDS = 0.01
PATIENT_TURNS = 4  # that a rank waits which does not know who is late, where another may wait for a server


class Accusation(NamedTuple):
    """What a rank that has waited too long can say."""

    lines: tuple[str, ...]  # one for each rank that is late; empty where it cannot be told
    turn: int  # how many others are to speak before: first who waits for a server, or the lowest that waits, of the
    # machine where one is late


class Heartbeats:
    """The beats of this machine's ranks; `world.beat` lies among them from here on. Collective.

    They share 64 bytes a rank even where the job keeps weights and gradients out of shared memory: who is late or gone
    is to be known there too. Where not even that is to be had, every rank's beat is its own.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._telling = threading.Lock()  # the main thread may learn of a death, and the one that hears signals
        needed = world.node_comm.Get_size() * FIELDS * np.dtype(np.float64).itemsize
        readable = shared_memory_shortage(needed) is None
        self._node: Node | None = None
        self._segments = [np.zeros(FIELDS)]
        own = 0
        everyone = world.gather_everywhere([world.host, readable])
        if all(everyone[rank][1] for rank in range(world.size)):
            self._node = Node(world)
            self._segments, own = self._node.segments(FIELDS, np.float64), self._node.rank
        world.beat.move(self._segments[own])
        if self._node:
            self._node.fence()
        here = {one.rank for one in self.seen()}
        self._elsewhere: dict[str, list[int]] = {}
        for rank, (host, _) in enumerate(everyone):
            if rank not in here:
                self._elsewhere.setdefault(host, []).append(rank)
        self._distant: DistantBeats | None = None
        if any(world.gather_everywhere(bool(self._elsewhere))) and self._node:
            self._distant = DistantBeats(world, self._node, self._segments)
        self._hosts = [host for host, _ in everyone]

    def seen(self) -> list[Seen]:
        """All ranks whose beats can be read, lowest first."""
        return [read(segment) for segment in self._segments]

    def look(self) -> None:
        """Now and then, from one thread: tell other machines, and hear of them."""
        if self._distant:
            self._distant.exchange()

    def accuse(self, limit_seconds: float) -> Accusation:
        """Who holds up this rank, which has waited for `limit_seconds` or more. From the thread that looks."""
        self.look()
        now = monotonic()
        seen = [one for one in self.seen() if not one.left]
        guilty = late(seen, now, limit_seconds / 2, bool(self._elsewhere)) if seen else []
        own = self._world.rank
        remedy = f"it is stopped or overloaded, or limits.stall_seconds ({limit_seconds:g}) is too short for this job"
        if guilty:
            lines = tuple(f"{_stuck(self._who(one), one, now)}; the others wait: {remedy}" for one in guilty)
            waiting = [one.rank for one in seen if one not in guilty]
            return Accusation(lines, int(own != min(waiting, default=own)))
        lowest = own == min((one.rank for one in seen), default=own)
        awaits = self._world.awaits
        awaited = awaits() if awaits else ""
        if not self._elsewhere and not awaited:
            return Accusation((), int(not lowest) + (PATIENT_TURNS if awaits is not None else 0))
        distant = self._late_elsewhere(seen, now, limit_seconds / 2)
        others = [self._heard_of(one, now) for one in distant]
        others = others or [f"rank {_numbers(ranks)} on {host}" for host, ranks in self._elsewhere.items()]
        there = " or ".join([awaited, *others] if awaited else others)
        here = self._world.beat.seen()
        line = f"{_stuck(self._who(here), here, now)}; waits for {there}: {remedy}"
        first = not others or self._are_mute(distant, now, limit_seconds / 2)  # else they may know better
        return Accusation((line,), (0 if first else 1) + (0 if lowest or not others else 1))

    def _late_elsewhere(self, here: list[Seen], now: float, silent_seconds: float) -> list[Seen]:
        """Those of the ranks of other machines that are late by what was heard of them."""
        there = [one for one in self._distant.seen() if not one.left] if self._distant else []
        guilty = late([*here, *there], now, silent_seconds, has_peers=True) if there else []
        return [one for one in guilty if one in there]

    def _are_mute(self, guilty: list[Seen], now: float, silent_seconds: float) -> bool:
        """Whether nothing is heard of their whole machines, so that nobody there can say more."""
        hosts = {self._hosts[one.rank] for one in guilty}
        seen = self._distant.seen() if self._distant else []
        return bool(hosts) and all(now - one.alive > silent_seconds for one in seen if self._hosts[one.rank] in hosts)

    def _heard_of(self, one: Seen, now: float) -> str:
        return f"rank {one.rank} on {self._hosts[one.rank]} (heard of {now - one.alive:.0f} s ago in {one.place()})"

    def spoken(self) -> bool:
        """Whether a rank of this machine has said why the job ends."""
        return any(one.spoken for one in self.seen())

    def dead(self) -> list[Seen]:
        """The ranks of this machine that ended without a word."""
        return [one for one in self.seen() if not one.left and has_ended(one.process)]

    def tell_gone(self, say: Callable[[str], object], by_any: bool = False) -> None:
        """A line to `say` for each rank of this machine that ended without a word, where this rank is to say it.

        That is the lowest of those left; `by_any`: whichever finds nothing said. No line is said twice by one rank, and
        when this returns the lines are out, whichever thread says them.
        """
        with self._telling:
            dead = self.dead()
            ranks = {one.rank for one in dead}
            lowest = self._world.rank == min(one.rank for one in self.seen() if one.rank not in ranks)
            if not dead or self.spoken() or not (lowest or by_any):
                return
            for one in dead:
                say(f"{self._who(one)}: gone in {one.place()}; killed by a signal, which the launcher names")
            self._world.beat.leave(spoken=True)

    def tell_gone_behind_a_fault(self, say: Callable[[str], object]) -> bool:
        """As `tell_gone`, for a fault that may come of another rank's end; whether it does, and all is said.

        A server sees a connection end before the process has. Where the lowest of those left says nothing, this one
        does. A rank that ended has perhaps said itself why.
        """
        if not _comes(lambda: self.spoken() or bool(self.dead())):
            return False
        self.tell_gone(say)
        if not _comes(self.spoken):
            self.tell_gone(say, by_any=True)
        return True

    def close(self) -> None:
        """Give the shared memory back. Collective."""
        if self._distant:
            self._distant.close()
        self._world.beat.move(np.zeros(FIELDS))
        if self._node:
            self._node.close()

    def _who(self, one: Seen) -> str:
        return f"rank {one.rank} of {self._world.size} on {self._world.host}"


def _comes(happens: Callable[[], bool]) -> bool:
    """Whether it does within DEATH_SECONDS."""
    deadline = monotonic() + DEATH_SECONDS
    while not (there := happens()) and monotonic() < deadline:
        sleep(LOOK_SECONDS)
    return there


def _stuck(who: str, one: Seen, now: float) -> str:
    return f"{who}: no progress for {now - one.since:.0f} s in {one.place()}"


def _numbers(ranks: list[int]) -> str:
    """Ranks in short: 3, 4 to 7, or 1, 3, 5."""
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"{ranks[0]} to {ranks[-1]}"
    return ", ".join(map(str, ranks))
