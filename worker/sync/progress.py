"""Where the ranks of a machine are, which each can read of the others at any time: so a stall names whom it waits for.

Rules: written without a fence, since a reader bears a figure that is a moment old, and read only when something must be
explained. What the system says of a process (stopped, gone) comes before what the process last said of itself. It must
cost a step nothing: a few integers a phase.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from time import monotonic_ns
from typing import Any, NamedTuple

import numpy as np

from worker.sync.node import shared_memory_shortage
from worker.sync.world import World

PHASES = (
    "the start", "the data", "forward", "backward", "the exchange", "the update", "the evaluation", "the checkpoint",
    "the results",
)  # fmt: skip  # in the order of a step and of an epoch's end
_INDEX = {phase: index for index, phase in enumerate(PHASES)}
_FIELDS = 4  # step, phase, since when (CLOCK_MONOTONIC, ns), process id
_STOPPED, _GONE = ("T", "t"), ("", "Z", "X")  # states in proc(5); empty: there is no such process
_LEFT = "left"  # instead of a state


class Whereabouts(NamedTuple):
    """One rank of this machine."""

    rank: int
    step: int
    phase: str
    seconds: float  # in this phase
    process: int
    state: str  # of the process, a letter of proc(5); empty where it is gone

    @property
    def at(self) -> tuple[int, int]:
        """How far it is, as pairs that compare."""
        return self.step, _INDEX[self.phase]

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.process}), in {_words(self.step, self.phase)} for {self.seconds:.1f} s"


class Progress:
    """This rank's place, and where it can read the others'. Collective to make."""

    def __init__(self, world: World) -> None:
        comm = world.node_comm
        self._world = world
        self._ranks: list[int] = comm.allgather(world.rank)
        self._others = sorted({host for host in world.gather_everywhere(world.host) if host != world.host})
        self._elsewhere = len(self._ranks) < world.size
        short = shared_memory_shortage(1 << 16) is not None
        self._window: Any = None
        if len(self._ranks) == 1 or any(world.gather_everywhere(short)):
            self._ranks = [world.rank]
            self._places = [np.zeros(_FIELDS, np.int64).data]
            own = 0
        else:
            from mpi4py import MPI

            own = comm.Get_rank()
            self._window = MPI.Win.Allocate_shared(_FIELDS * 8, 8, comm=comm)
            self._places = [self._place_of(rank) for rank in range(len(self._ranks))]
        self._own = self._places[own]
        self._own[3] = os.getpid()
        self.enter("the start", 0)

    def _place_of(self, local_rank: int) -> memoryview:
        memory: Any  # mpi4py's buffer, which mypy does not know as one
        memory, _ = self._window.Shared_query(local_rank)
        return np.ndarray((_FIELDS,), np.int64, buffer=memory).data

    def enter(self, phase: str, step: int | None = None) -> None:
        """This rank's next phase, one of PHASES; the step stays unless one is given."""
        own = self._own
        if step is not None:
            own[0] = step
        own[1] = _INDEX[phase]
        own[2] = monotonic_ns()

    def here(self) -> str:
        """Where this rank is."""
        step, phase, *_ = self._own.tolist()
        return f"in {_words(step, PHASES[phase])}"

    def whereabouts(self) -> list[Whereabouts]:
        """Of every rank of this machine."""
        now = monotonic_ns()
        found = []
        for rank, place in zip(self._ranks, self._places, strict=True):
            step, phase, since, process = place.tolist()
            found.append(Whereabouts(rank, step, PHASES[phase], (now - since) / 1e9, process, _state(process)))
        return found

    def who_is_late(self) -> str:
        """Whom the others wait for, on one line."""
        elsewhere = ", ".join(self._others) or self._world.host
        return who_is_late(self.whereabouts(), self._world.host, elsewhere if self._elsewhere else "")

    def leave(self) -> None:
        """This rank ends, and has said what it had to say: nobody need miss it."""
        self._own[3] = 0

    def who_is_gone(self) -> str | None:
        """A rank of this machine that has ended without a word, to be said by the lowest that lives; None elsewhere."""
        self.leave()
        found = self.whereabouts()
        gone = [place for place in found if place.state in _GONE]
        living = [place.rank for place in found if place.state not in _GONE]
        if not gone or living[0] != self._world.rank:
            return None
        return " and ".join(map(str, gone)) + f", is gone ({self._world.host})"

    def close(self) -> None:
        """Give the shared memory back. Collective over the machine's ranks."""
        self._places, self._own = [], np.zeros(_FIELDS, np.int64).data
        if self._window is not None:
            self._window.Free()


def who_is_late(places: Sequence[Whereabouts], host: str, elsewhere: str) -> str:
    """Whom these ranks of one machine wait for.

    Args:
        elsewhere: hosts of the other ranks; empty where these are all.
    """
    for states, word in ((_GONE, "is gone"), (_STOPPED, "is stopped")):
        if found := [place for place in places if place.state in states]:
            return f"{' and '.join(map(str, found))}, {word} ({host})"
    furthest = max(place.at for place in places)
    if late := [place for place in places if place.at < furthest]:
        return f"{' and '.join(map(str, late))}, is late ({host})"
    first = places[0]
    where = _words(first.step, first.phase)
    if elsewhere:
        return f"every rank of {host} is in {where} and waits for one of {elsewhere}"
    return f"{'every rank' if len(places) > 1 else 'this rank'} is in {where}"


def _words(step: int, phase: str) -> str:
    return f"{phase} of step {step}" if step else phase


def _state(process: int) -> str:
    if process == 0:
        return _LEFT
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):  # it ended, perhaps while it was read
        return ""
