"""How far a rank is, in eight numbers that others can read, and who is late by them.

A rank writes which step and phase it is in; its watchdog's thread writes that the process runs at all. Who waits too
long reads the numbers of the ranks of its machine and names the one that holds them up.

Rules: one writer, any readers, no fence: a reader may see a step and the phase of the one before, for an instant that
a stall of seconds outlasts. Times are of the monotonic clock, which the processes of a machine share. Who is late is
decided by pure functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import NamedTuple

import numpy as np

# In the order of a step: of two ranks in one step the earlier phase is behind. In `publish` a rank has updated its part
# of the weights and waits for the others': to people that is the exchange.
PHASES = (
    *("starting", "data", "forward", "backward", "exchange", "update", "publish"),
    *("evaluate", "checkpoint", "results"),
)
NUMBERS = {phase: number for number, phase in enumerate(PHASES)}
SHOWN = {"publish": "exchange"}

EXCHANGING = ("exchange", "update", "publish")

FIELDS = 8  # a cache line: no two ranks write the same one
RANK, PROCESS, STEP, EPOCH, PHASE, SINCE, ALIVE, LEFT = range(FIELDS)
FIRST_PHASE = float(NUMBERS["data"])


class Beat:
    """This rank's numbers; its own until `move` puts them where others read them. Marking a phase takes 0.12 us."""

    def __init__(self, rank: int, process: int) -> None:
        """`process`: its id, by which others see that it is gone."""
        self._cells = _cells(np.zeros(FIELDS))
        self._cells[RANK], self._cells[PROCESS] = rank, process
        self._cells[SINCE] = self._cells[ALIVE] = monotonic()

    def move(self, segment: np.ndarray) -> None:
        """Go on in `segment`, (FIELDS,) float64."""
        segment[:] = self._cells
        self._cells = _cells(segment)

    def step(self, step: int, epoch: int) -> None:
        """A step begins, with its data; both count from 1."""
        cells = self._cells
        cells[PHASE] = FIRST_PHASE
        cells[STEP] = step
        cells[EPOCH] = epoch
        cells[SINCE] = monotonic()

    def phase(self, name: str) -> None:
        """One of PHASES begins."""
        cells = self._cells
        cells[PHASE] = NUMBERS[name]
        cells[SINCE] = monotonic()

    def live(self) -> None:
        """The process runs, whatever its step does."""
        self._cells[ALIVE] = monotonic()

    def leave(self, spoken: bool = False) -> None:
        """From here on nobody need wonder why this process is gone; `spoken`: it has said why the job ends."""
        self._cells[LEFT] = max(self._cells[LEFT], 2.0 if spoken else 1.0)

    def seen(self) -> Seen:
        """As others see it."""
        return read(np.asarray(self._cells))


class Seen(NamedTuple):
    """One rank's numbers, as another reads them."""

    rank: int
    process: int
    step: int  # 0: none yet
    epoch: int
    phase: str
    since: float  # seconds of the monotonic clock at which the phase began
    alive: float  # at which its watchdog last ran
    left: bool  # it ends, and knows it
    spoken: bool  # it has said why the job ends

    def place(self) -> str:
        """Where it is, for people."""
        if self.phase == "starting":
            return "the start, before the first step"
        if self.phase == "results":
            return "the end, after the last step"
        return f"step {self.step} (epoch {self.epoch}), phase {SHOWN.get(self.phase, self.phase)}"

    def position(self, has_peers: bool) -> tuple[int, int]:
        """Ordered as training goes on. In an exchange with peers on other machines each waits for its own, so that
        whoever is further there is not ahead."""
        return self.step, NUMBERS["publish" if has_peers and self.phase in EXCHANGING else self.phase]


def _cells(segment: np.ndarray) -> memoryview[float]:
    """Written to in a third of the time that NumPy takes."""
    return segment.data.cast("B").cast("d")


def read(segment: np.ndarray) -> Seen:
    """What a rank has written into its (FIELDS,) float64."""
    values = segment.tolist()
    phase = PHASES[int(values[PHASE])]
    rank, process, step, epoch = (int(values[field]) for field in (RANK, PROCESS, STEP, EPOCH))
    return Seen(rank, process, step, epoch, phase, values[SINCE], values[ALIVE], values[LEFT] > 0, values[LEFT] > 1)


def late(seen: Sequence[Seen], now: float, silent_seconds: float, has_peers: bool = False) -> list[Seen]:
    """Whom the others wait for: who has given no sign of life for so long, else who is behind the farthest.

    `has_peers`: there are ranks on other machines too.
    Empty where all are equally far: then it is none of these, or it cannot be told.
    """
    silent = [one for one in seen if now - one.alive > silent_seconds]
    if silent:
        return silent
    farthest = max(one.position(has_peers) for one in seen)
    return [one for one in seen if one.position(has_peers) < farthest]
