"""One shard of the parameter vector as a state machine: pushes and the clock go in, answers come out.

A chunk waits until its mode says that enough workers have pushed it; who they are is said in worker/server/members.py.
Then the workers' sums are added in worker order, divided by the samples of the whole batch (where guests take part: by
those that were really pushed), and the optimizer runs on that chunk alone; its weights go back at once, while later
chunks are still on their way. So push, update and pull overlap. In the modes without that wait
(worker/server/modes.py) each worker has its own clock, and a push is applied when it comes. Where the gradient is
clipped by its global norm or the optimizer has trust ratios, every chunk must be there before the first is
applied; then all are, and all answers go out together.

Rules: no I/O, no thread, no clock; `now` is an argument. What is refused raises and changes nothing. A synchronous
result does not depend on the order of arrival, to the last bit. Once `fault` says why the job cannot go on,
nothing is applied.
"""

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from worker.clipping import norm_factor, sum_of_squares
from worker.server.checks import check_push
from worker.server.chunk import Chunk
from worker.server.members import Members, News
from worker.server.own_pace import OwnPace
from worker.server.pushes import NO_GUESTS, Answer, Conflict, Push, Refused, ShardSetup
from worker.server.subtrees import Subtrees, exact_square_sum, exact_square_sums
from worker.trust_ratio import add_square_sums, scale, trust_ratios
from worker.wire import Float32, chunk_bounds

if TYPE_CHECKING:
    from worker.optimizers import Optimizer


class Shard:
    """Parameters, optimizer state and the step under way."""

    def __init__(
        self,
        setup: ShardSetup,
        optimizer: "Optimizer",
        parameters: Float32,
        state: Mapping[str, Float32],
        step: int = 0,
    ) -> None:
        """Take over `parameters` and `state` (1-D, length stop - start), which hold the result of `step` steps."""
        self.setup = setup
        self.step = step  # applied to every chunk
        self.fault: str | None = None
        self.parameters = parameters
        self.state = dict(state)
        self._optimizer = optimizer
        self._subtrees = Subtrees(setup.virtual_shards, setup.workers) if setup.virtual_shards else None
        bounds = chunk_bounds(setup.start, setup.stop, setup.chunk_elements)
        self._chunks = {
            start: Chunk((start, stop), setup.start, parameters, state, setup.decayed, step, setup.workers)
            for start, stop in bounds
        }
        # A norm needs every chunk before the first may be applied.
        self._waits_for_all = setup.clip_norm > 0 or optimizer.direct is not None
        if self._waits_for_all and (setup.start, setup.stop) != (0, setup.parameter_count):
            raise ValueError("clip_norm, and an optimizer with trust ratios, need a shard of the whole vector")
        if self._waits_for_all and setup.mode.at_once:
            raise ValueError("clip_norm, and an optimizer with trust ratios, need the synchronous mode")
        room = len(parameters) if self._waits_for_all else min(setup.chunk_elements, len(parameters))
        self._sum = np.empty(room, np.float32)
        self.members = Members(setup)
        self._authority = setup.start == 0
        self.restored_step = step
        self._told: dict[int, int] = {}  # where the shard is back from a snapshot: worker -> the steps it has done
        self._terms: Push | None = None  # the open step's first push by a founding worker: all others must agree
        self._named: set[int] = set()  # the guests that the open step's pushes name
        self._opened = 0.0
        self._total_count: int | None = None  # that the founding workers send
        self._totals: tuple[float, ...] = ()
        self._samples = 0  # that the totals are of
        self._guests: tuple[int, ...] = ()  # of the step that comes next
        self._own_pace = (
            OwnPace(setup, self.members, self._chunks, optimizer, self._sum) if setup.mode.at_once else None
        )

    @property
    def version(self) -> tuple[int, int]:
        """Steps applied, and chunks of the step under way that are applied (for each worker, if each has a clock)."""
        if self._own_pace:
            return self._own_pace.version
        return self.step, sum(chunk.step > self.step for chunk in self._chunks.values())

    @property
    def awaits_workers(self) -> bool:
        """Back from a snapshot, and not told yet by every worker how far training has come."""
        return self.setup.restored and len(self._told) < self.setup.workers

    @property
    def awaits_founders(self) -> bool:
        """Guests cannot join yet."""
        return self.awaits_workers or (self._own_pace is not None and self._own_pace.rate is None)

    def join(
        self, worker: int, generation: int, parameter_count: int, layout_digest: str,
        step: int = 0, answered: tuple[int, tuple[float, ...]] = (0, ()),
    ) -> None:  # fmt: skip
        """Admit a worker of the same launch and the same model; joining twice is joining once.

        A shard back from a snapshot goes on at the furthest of the workers' steps, once it knows all. One that is a
        step behind had no answer to its last push: it repeats it and gets the weights that there are, with the samples
        and totals that others were `answered` in that step, since all decide by them.
        """
        self.members.check(worker, generation)
        self._check_model(worker, parameter_count, layout_digest)
        self.members.joined.add(worker)
        if self.awaits_workers:
            self._told[worker] = step
            if step == max(self._told.values()):
                self._samples, self._totals = answered
            if not self.awaits_workers:
                self._go_on()

    def welcome(
        self, number: int, generation: int, parameter_count: int, layout_digest: str, step: int, now: float
    ) -> int:
        """Take in a guest and return its number; -1 asks for one. It takes part once its stream is open.

        `step`: of its clock, as another shard has given it; the authority's own is `self.step`.
        """
        setup = self.setup
        if not setup.guests:
            raise Conflict(NO_GUESTS)
        if generation != setup.generation:
            self.members.check(0, generation)
        if self.fault is not None:
            raise Conflict(self.fault)
        if self.members.over:
            raise Conflict("the job is over")
        if number == -1 and not self._authority:
            raise Refused("a guest is numbered by the shard that holds element 0: ask that one first")
        if number != -1 and self._authority:
            raise Refused(f"guest {number} is no number that was given: join with -1, and this shard gives one")
        self._check_model(number, parameter_count, layout_digest)
        return self.members.welcome(number, self.version[0] if number == -1 else step, now)

    def open(self, worker: int, generation: int, now: float) -> None:
        """A worker's stream is there."""
        self.members.check(worker, generation)
        if self.members.is_founding(worker):
            self.members.check_joined(worker, generation)
        if self.fault is not None:
            raise Conflict(self.fault)
        if worker not in self.members.guests:
            return
        if self._own_pace:
            clock = self.members.guests[worker].clock
            self._own_pace.add(worker, clock)
            self.members.open(worker, clock + 1, now)
            return
        # Step self.step + 1 is open; the answers to the one behind it are the first that this guest has all of.
        self.members.open(worker, self.step + 3, now)

    def _check_model(self, worker: int, parameter_count: int, layout_digest: str) -> None:
        if (parameter_count, layout_digest) != (self.setup.parameter_count, self.setup.layout_digest):
            who = f"worker {worker}" if worker >= 0 else "the guest"
            raise Conflict(
                f"{who} has a model of {parameter_count} parameters and layout {layout_digest[:12]}, the "
                f"parameter server one of {self.setup.parameter_count} and {self.setup.layout_digest[:12]}: "
                "start every worker with the same job file"
            )

    def _go_on(self) -> None:
        first, last = min(self._told.values()), max(self._told.values())
        if self._own_pace:
            self.step = first
            self._own_pace.set_clocks(self._told)
            return
        if last - first > 1 or first < self.step:
            steps = ", ".join(f"worker {worker}: {step}" for worker, step in sorted(self._told.items()))
            self.fault = f"the shard is back from its snapshot after step {self.step}, the workers' are {steps}"
            return
        self.step = last
        for chunk in self._chunks.values():
            chunk.step = last

    def leave(self, worker: int, generation: int) -> list[Answer]:
        """A worker is done; a synchronous step that still needs it cannot be completed, others need not wait for it.

        A synchronous guest is still waited for in the step that its number was named for, and in no other.
        """
        self.members.check(worker, generation)
        if worker in self.members.guests:
            self.members.guests[worker].leaving = True
            return self._remove_guest(worker, "") if self._own_pace else []
        if self._own_pace:
            self.members.left[worker] = self._own_pace.last_step(worker)
            return self._advanced(self._own_pace.remove(worker))
        self.members.left[worker] = self.step
        if any(self._by_founders(chunk) and worker not in chunk.held for chunk in self._chunks.values()):
            self.fault = self.fault or self.members.parted(worker)
        return []

    def lose(self, worker: int, why: str) -> list[Answer]:
        """A worker's stream is over; nothing to mourn if it had left. A guest is waited for no more."""
        if worker in self.members.guests:
            return self._remove_guest(worker, why)
        if self.members.is_founding(worker) and worker not in self.members.left:
            self.fault = self.fault or f"{self.members.name(worker)} is gone at step {self.step + 1}: {why}"
        return []

    def hear(self, worker: int, now: float) -> None:
        """A word of a worker that pushes nothing."""
        self.members.hear(worker, now)

    def take_news(self) -> list[News]:
        """What became of guests since the last call."""
        news, self.members.news = self.members.news, []
        return news

    def _remove_guest(self, worker: int, why: str) -> list[Answer]:
        self.members.lose(worker, self.step + 1, why)
        if self._own_pace:
            return self._advanced(self._own_pace.remove(worker))
        return self._apply_complete(self._chunks.values())

    def _advanced(self, answers: list[Answer]) -> list[Answer]:
        """The answers of workers with clocks, whose slowest says how far the shard is."""
        self.step = self.version[0]
        return answers

    def expire(self, now: float) -> list[Answer]:
        """Drop guests that are silent, and give up a step that waits longer than `step_timeout_seconds`.

        Guests that it waits for are dropped; founding workers are named in the fault.
        """
        answers = [answer for silent in self.members.silent(now) for answer in self._remove_guest(*silent)]
        if self._own_pace:
            slow = self._own_pace.late(now)
            for guest in slow.keys() & self.members.guests.keys():
                answers += self._remove_guest(guest, f"{slow.pop(guest)}it")
            for what in list(slow.values())[:1]:
                names = " and ".join(self.members.name(worker) for worker in slow if slow[worker] == what)
                self.fault = self.fault or what + names
            return answers
        waited = now - self._opened
        if self._terms is None or waited <= self.setup.step_timeout_seconds:
            return answers
        needed = self.members.waited_for(self._named)
        waiting = [chunk for chunk in self._chunks.values() if chunk.step == self.step]
        late = [worker for worker in sorted(needed) if any(worker not in chunk.held for chunk in waiting)]
        founding = [worker for worker in late if self.members.is_founding(worker)]
        for guest in sorted(set(late).difference(founding)):
            answers += self._remove_guest(guest, f"its gradient was waited for {waited:.1f} s")
        if founding:
            self.fault = self.fault or (
                f"step {self.step + 1} waited {waited:.1f} s for the gradient of "
                + " and ".join(self.members.name(worker) for worker in founding)
            )
        return answers

    def receive(self, push: Push, now: float) -> list[Answer]:
        """Take one push; answer whoever's wait it ends. A push seen before is applied once and answered again."""
        if self.fault is not None:
            self.members.check_joined(push.worker, push.generation)
            raise Conflict(self.fault)
        chunk = check_push(
            push, self.setup, self.members, self._chunks, self._subtrees, self.step, self._terms, self._total_count
        )  # fmt: skip
        self.members.hear(push.worker, now)
        if push.offset == self.setup.start and self.members.is_founding(push.worker):
            self._total_count = len(push.totals)
        if self._own_pace:
            return self._advanced(self._own_pace.receive(chunk, push, now))
        if chunk.step == push.step:
            return [self._answer(chunk, (push.worker,))._replace(again=True)]
        if push.worker in chunk.held:
            return []
        if self._terms is None and self.members.is_founding(push.worker):
            self._terms, self._opened = push, now
        self._named.update(push.guests)
        chunk.held[push.worker] = push
        return self._apply_complete([chunk])

    def _apply_complete(self, chunks: Iterable[Chunk]) -> list[Answer]:
        """Apply those of the chunks that wait for nobody any more, or all together where each needs all."""
        needed = self.members.waited_for(self._named)
        complete = [
            chunk for chunk in chunks
            if chunk.held and chunk.mean is None and needed <= chunk.held.keys()
        ]  # fmt: skip
        if not complete or self.fault is not None:
            return []
        assert self._terms is not None  # founding workers have pushed
        terms = self._terms
        answers = []
        for chunk in complete:
            self._sum_up(chunk, terms.samples)
            if not self._waits_for_all:
                answers.append(self._apply(chunk, terms))
        if not self._waits_for_all:
            return answers
        means = [other.mean for other in self._chunks.values() if other.mean is not None]
        if len(means) < len(self._chunks):
            return []
        if self.setup.clip_norm:
            squares = exact_square_sum(self._sum) if self._subtrees else math.fsum(map(sum_of_squares, means))
            factor = np.float32(norm_factor(squares, self.setup.clip_norm))
            for mean in means:
                np.multiply(mean, factor, out=mean)
        if self._optimizer.direct:
            self._direct(terms.step)
        return [self._apply(other, terms) for other in self._chunks.values()]

    def _by_founders(self, chunk: Chunk) -> bool:
        return any(self.members.is_founding(worker) for worker in chunk.held)

    def _sum_up(self, chunk: Chunk, samples: int) -> None:
        """Sum in worker order, divide by the batch, or by what is there of it where guests may be missing."""
        if self._named:
            samples = sum(push.share for push in chunk.held.values())
        if chunk.offset == self.setup.start:
            self._samples = samples
        pushes = [chunk.held[worker] for worker in sorted(chunk.held)]
        place = chunk.offset - self.setup.start if self._waits_for_all else 0
        chunk.mean = mean = self._sum[place : place + len(chunk.parameters)]
        if self._subtrees:
            total = self._subtrees.total([push.gradient for push in pushes], len(mean))
        else:
            total = pushes[0].gradient
            for other in pushes[1:]:
                total = np.add(total, other.gradient, out=mean)
        np.divide(total, np.float32(max(1, samples)), out=mean)
        # Their sum is all that is needed: a chunk that waits for the norm holds no more memory than one vector.
        chunk.held = {push.worker: push._replace(gradient=mean[:0]) for push in pushes}

    def _direct(self, step: int) -> None:
        """Turn the whole mean gradient into the step's direction, each tensor scaled by its trust ratio."""
        assert self._optimizer.direct is not None
        decayed = self.setup.decayed
        self._optimizer.direct(self.parameters, self._sum, self.state, step, decayed)
        if self._subtrees:
            sums = exact_square_sums(self.parameters, self._sum, decayed)
        else:
            sums = np.zeros((len(decayed), 2))
            add_square_sums(sums, self.parameters, self._sum, decayed)
        scale(self._sum, decayed, trust_ratios(sums))

    def _apply(self, chunk: Chunk, terms: Push) -> Answer:
        """Run the optimizer on this chunk; the answer is for all whose push was held, and for guests that listen."""
        assert chunk.mean is not None
        workers = tuple(sorted(chunk.held))
        self._optimizer.update(
            chunk.parameters, chunk.mean, chunk.state, terms.step, terms.learning_rate, chunk.decayed
        )
        if chunk.offset == 0:
            self._guests = self.members.of_step(terms.step + 1)
        if chunk.offset == self.setup.start:
            self._totals = self._summed_totals([chunk.held[worker].totals for worker in workers])
        chunk.held.clear()
        chunk.mean = None
        chunk.step = terms.step
        if all(other.step == terms.step for other in self._chunks.values()):
            self.step, self._terms = terms.step, None
            self._named.clear()
        return self._answer(chunk, tuple(sorted({*workers, *self.members.present})))

    def _summed_totals(self, pushed: list[tuple[float, ...]]) -> tuple[float, ...]:
        if self._subtrees:
            return self._subtrees.totals(pushed)
        return tuple(math.fsum(column) for column in zip(*pushed, strict=True))

    def _answer(self, chunk: Chunk, workers: tuple[int, ...]) -> Answer:
        answer = Answer(workers, chunk.step, chunk.offset, chunk.parameters, ())
        if chunk.offset == self.setup.start:
            answer = answer._replace(totals=self._totals, samples=self._samples)
        if chunk.offset == 0:
            answer = answer._replace(guests=self._guests, dropped_guests=self.members.dropped)
        return answer
