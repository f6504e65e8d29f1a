"""The modes in which each worker has a clock of its own, and a push is applied when it comes (modes.py).

A guest's push is applied at the founding workers' newest learning rate, for they have the schedule.

Rules: as in shard.py. A push is checked before it comes here.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from worker.server.chunk import Chunk
from worker.server.members import Members
from worker.server.pushes import Answer, Push, ShardSetup
from worker.wire import Float32

if TYPE_CHECKING:
    from worker.optimizers import Optimizer


class OwnPace:
    """The workers' clocks on a shard's chunks."""

    def __init__(
        self, setup: ShardSetup, members: Members, chunks: Mapping[int, Chunk], optimizer: "Optimizer", room: Float32
    ) -> None:
        """`room` is for a chunk's mean gradient."""
        self.rate: float | None = None  # the founding workers' newest
        self._setup = setup
        self._mode = setup.mode
        self._members = members
        self._chunks = chunks
        self._optimizer = optimizer
        self._room = room
        self._newest: dict[int, Push] = {}  # worker -> its last push of the chunk at the start, without the gradient

    @property
    def version(self) -> tuple[int, int]:
        """Steps done on every chunk by every worker, and how many more of a chunk and worker there are."""
        done = [step for chunk in self._chunks.values() for step in chunk.clocks.done.values()]
        return min(done), sum(step > min(done) for step in done)

    def set_clocks(self, done: Mapping[int, int]) -> None:
        """The shard has died, and its workers have told how far they are."""
        for chunk in self._chunks.values():
            chunk.clocks.done.update(done)

    def last_step(self, worker: int) -> int:
        """That this worker has pushed."""
        return max(chunk.clocks.done.get(worker, 0) for chunk in self._chunks.values())

    def add(self, worker: int, step: int) -> None:
        """A guest begins behind `step`."""
        for chunk in self._chunks.values():
            chunk.clocks.add(worker, step)

    def receive(self, chunk: Chunk, push: Push, now: float) -> list[Answer]:
        """Apply a worker's own step on its own; answer all whom it lets go on."""
        clocks, worker = chunk.clocks, push.worker
        if clocks.done[worker] == push.step:
            return [] if worker in clocks.waiting else [self._answer(chunk, worker, 0.0)]
        if self._members.is_founding(worker):
            self.rate = push.learning_rate
        if push.share:
            assert self.rate is not None  # guests come behind the founding workers' first pushes
            mean = np.divide(push.gradient, np.float32(push.share), out=self._room[: len(push.gradient)])
            rate = self.rate * push.share / push.samples * self._mode.rate_factor(clocks.staleness(worker))
            count = chunk.updates_before + clocks.updates + 1
            self._optimizer.update(chunk.parameters, mean, chunk.state, count, rate, chunk.decayed)
        clocks.advance(worker, now)
        if chunk.offset == self._setup.start:
            self._newest[worker] = push._replace(gradient=self._room[:0])
        return self._released(chunk)

    def remove(self, worker: int) -> list[Answer]:
        """Nobody waits for this worker any more; answers to those who did."""
        self._newest.pop(worker, None)
        for chunk in self._chunks.values():
            chunk.clocks.remove(worker)
        return [answer for chunk in self._chunks.values() for answer in self._released(chunk)]

    def late(self, now: float) -> dict[int, str]:
        """Whom a worker waits for too long to come near, and what is to be said of it, up to the name."""
        found: dict[int, str] = {}
        for chunk in self._chunks.values():
            done = chunk.clocks.done
            for worker, (since, _) in chunk.clocks.waiting.items():
                if now - since > self._setup.step_timeout_seconds:
                    what = f"step {done[worker]} of {self._members.name(worker)} waited {now - since:.1f} s for "
                    slow = [other for other in sorted(done) if done[worker] - done[other] > self._mode.lead_steps]
                    found |= {other: what for other in slow if other not in found}
        return found

    def _released(self, chunk: Chunk) -> list[Answer]:
        return [self._answer(chunk, *ready) for ready in chunk.clocks.release(self._mode.lead_steps)]

    def _answer(self, chunk: Chunk, worker: int, staleness: float) -> Answer:
        """The totals are the workers' newest, scaled to the whole batch."""
        answer = Answer((worker,), chunk.clocks.done[worker], chunk.offset, chunk.parameters, (), staleness)
        if chunk.offset == 0:
            answer = answer._replace(guests=self._members.staying, dropped_guests=self._members.dropped)
        if chunk.offset != self._setup.start or worker not in self._newest:
            return answer
        newest, size = self._newest.values(), len(self._newest[worker].totals)
        samples, shares = self._newest[worker].samples, sum(push.share for push in newest)
        factor = samples / shares if shares else 1.0
        sums = (math.fsum(column) for column in zip(*(p.totals for p in newest if len(p.totals) == size), strict=True))
        return answer._replace(totals=tuple(factor * total for total in sums), samples=samples)
