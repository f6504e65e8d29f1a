"""One shard of the parameter vector as a state machine: pushes and the clock go in, answers come out.

A chunk waits until its mode says that enough workers have pushed it. Then the workers' sums are added in worker order,
divided by the samples of the whole batch, and the optimizer runs on that chunk alone; its weights go back at once,
while later chunks are still on their way. So push, update and pull overlap. In the modes without that wait
(worker/server/modes.py) each worker has its own clock, and a push is applied when it comes. Where the gradient is
clipped by its global norm or the optimizer has trust ratios, every chunk must be there before the first is
applied; then all are, and all answers go out together.

Rules: no I/O, no thread, no clock; `now` is an argument. What is refused raises and changes nothing. A synchronous
result does not depend on the order of arrival, to the last bit. Once `fault` says why the job cannot go on,
nothing is applied.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from worker.clipping import norm_factor, sum_of_squares
from worker.server.clocks import Clocks
from worker.server.pushes import Answer, Conflict, Push, Refused, ShardSetup
from worker.server.subtrees import Subtrees, exact_square_sum, exact_square_sums
from worker.trust_ratio import add_square_sums, scale, trust_ratios
from worker.wire import Float32, chunk_bounds

if TYPE_CHECKING:
    from worker.optimizers import Optimizer


class _Chunk:
    """A chunk's views of the shard's arrays, and what it waits for."""

    def __init__(
        self, bounds: tuple[int, int], shard_start: int, parameters: Float32, state: Mapping[str, Float32],
        decayed: Sequence[tuple[int, int]], step: int, workers: int,
    ) -> None:  # fmt: skip
        start, stop = bounds
        here = slice(start - shard_start, stop - shard_start)
        self.offset = start
        self.parameters = parameters[here]
        self.state = {name: array[here] for name, array in state.items()}
        # Weight decay's ranges, cut to this chunk and counted from its first element.
        self.decayed = tuple(
            (max(first, start) - start, min(last, stop) - start)
            for first, last in decayed
            if max(first, start) < min(last, stop)
        )
        self.step = step
        self.held: dict[int, Push] = {}
        self.mean: Float32 | None = None  # of the gradients held, once there are enough
        self.clocks = Clocks(workers, step)
        self.updates_before = step * workers  # what the optimizer counts on from, where each push is an update


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
        self._mode = setup.mode
        self._subtrees = Subtrees(setup.virtual_shards, setup.workers) if setup.virtual_shards else None
        bounds = chunk_bounds(setup.start, setup.stop, setup.chunk_elements)
        self._chunks = {
            start: _Chunk((start, stop), setup.start, parameters, state, setup.decayed, step, setup.workers)
            for start, stop in bounds
        }
        # A norm needs every chunk before the first may be applied.
        self._waits_for_all = setup.clip_norm > 0 or optimizer.direct is not None
        if self._waits_for_all and (setup.start, setup.stop) != (0, setup.parameter_count):
            raise ValueError("clip_norm, and an optimizer with trust ratios, need a shard of the whole vector")
        if self._waits_for_all and self._mode.at_once:
            raise ValueError("clip_norm, and an optimizer with trust ratios, need the synchronous mode")
        room = len(parameters) if self._waits_for_all else min(setup.chunk_elements, len(parameters))
        self._sum = np.empty(room, np.float32)
        self._joined: set[int] = set()
        self.restored_step = step
        self._told: dict[int, int] = {}  # where the shard is back from a snapshot: worker -> the steps it has done
        self._left: dict[int, int] = {}  # worker -> the last step before it left
        self._terms: Push | None = None  # the open step's first push: all others must agree with it
        self._opened = 0.0
        self._totals: tuple[float, ...] = ()
        self._newest: dict[int, Push] = {}  # worker -> its last push of the chunk at the start, without the gradient

    @property
    def version(self) -> tuple[int, int]:
        """Steps applied, and chunks of the step under way that are applied (for each worker, if each has a clock)."""
        if self._mode.at_once:
            done = [step for chunk in self._chunks.values() for step in chunk.clocks.done.values()]
            return min(done), sum(step > min(done) for step in done)
        return self.step, sum(chunk.step > self.step for chunk in self._chunks.values())

    @property
    def awaits_workers(self) -> bool:
        """Back from a snapshot, and not told yet by every worker how far training has come."""
        return self.setup.restored and len(self._told) < self.setup.workers

    def join(self, worker: int, generation: int, parameter_count: int, layout_digest: str, step: int = 0) -> None:
        """Admit a worker of the same launch and the same model; joining twice is joining once.

        A shard back from a snapshot goes on at the furthest of the workers' steps, once it knows all. One that is a
        step behind had no answer to its last push: it repeats it and gets the weights that there are.
        """
        self.check_member(worker, generation)
        if (parameter_count, layout_digest) != (self.setup.parameter_count, self.setup.layout_digest):
            raise Conflict(
                f"worker {worker} has a model of {parameter_count} parameters and layout {layout_digest[:12]}, the "
                f"parameter server one of {self.setup.parameter_count} and {self.setup.layout_digest[:12]}: "
                "start every worker with the same job file"
            )
        self._joined.add(worker)
        if self.awaits_workers:
            self._told[worker] = step
            if not self.awaits_workers:
                self._go_on()

    def _go_on(self) -> None:
        first, last = min(self._told.values()), max(self._told.values())
        if self._mode.at_once:
            self.step = first
            for chunk in self._chunks.values():
                chunk.clocks.done.update(self._told)
            return
        if last - first > 1 or first < self.step:
            steps = ", ".join(f"worker {worker}: {step}" for worker, step in sorted(self._told.items()))
            self.fault = f"the shard is back from its snapshot after step {self.step}, the workers' are {steps}"
            return
        self.step = last
        for chunk in self._chunks.values():
            chunk.step = last

    def leave(self, worker: int, generation: int) -> list[Answer]:
        """A worker is done; a synchronous step that still needs it cannot be completed, others need not wait for it."""
        self.check_member(worker, generation)
        if self._mode.at_once:
            self._left[worker] = max(chunk.clocks.done.get(worker, 0) for chunk in self._chunks.values())
            for chunk in self._chunks.values():
                chunk.clocks.remove(worker)
            self.step = self.version[0]
            return [answer for chunk in self._chunks.values() for answer in self._released(chunk)]
        self._left[worker] = self.step
        if any(chunk.held and worker not in chunk.held for chunk in self._chunks.values()):
            self.fault = self.fault or self._parted(worker)
        return []

    def lose(self, worker: int, why: str) -> None:
        """A worker is gone without a word; nothing to mourn if it had left."""
        if worker not in self._left:
            self.fault = self.fault or f"{self._name(worker)} is gone at step {self.step + 1}: {why}"

    def expire(self, now: float) -> None:
        """Give up a step that waits longer than `step_timeout_seconds`, naming whom it waits for."""
        if self._mode.at_once:
            self._expire_clocks(now)
            return
        if self._terms is None or now - self._opened <= self.setup.step_timeout_seconds:
            return
        waiting = [chunk for chunk in self._chunks.values() if chunk.step == self.step]
        late = [w for w in range(self.setup.workers) if any(w not in chunk.held for chunk in waiting)]
        self.fault = self.fault or (
            f"step {self.step + 1} waited {now - self._opened:.1f} s for the gradient of "
            + " and ".join(self._name(worker) for worker in late)
        )

    def receive(self, push: Push, now: float) -> list[Answer]:
        """Take one push; answer whoever's wait it ends. A push seen before is applied once and answered again."""
        chunk = self._check(push)
        if self._mode.at_once:
            return self._receive_at_once(chunk, push, now)
        if chunk.step == push.step:
            return [self._answer(chunk, (push.worker,))._replace(again=True)]
        if push.worker in chunk.held:
            return []
        if self._terms is None:
            self._terms, self._opened = push, now
        chunk.held[push.worker] = push
        if len(chunk.held) < self.setup.workers:
            return []
        self._sum_up(chunk, push.samples)
        if not self._waits_for_all:
            return [self._apply(chunk, push)]
        means = [other.mean for other in self._chunks.values() if other.mean is not None]
        if len(means) < len(self._chunks):
            return []
        if self.setup.clip_norm:
            squares = exact_square_sum(self._sum) if self._subtrees else math.fsum(map(sum_of_squares, means))
            factor = np.float32(norm_factor(squares, self.setup.clip_norm))
            for mean in means:
                np.multiply(mean, factor, out=mean)
        if self._optimizer.direct:
            self._direct(push.step)
        return [self._apply(other, push) for other in self._chunks.values()]

    def check_member(self, worker: int, generation: int) -> None:
        """Refuse a worker of another launch, or a number that no worker of this launch has."""
        if generation != self.setup.generation:
            age = "an earlier" if generation < self.setup.generation else "a later"
            raise Conflict(
                f"worker {worker} is of {age} launch: generation {generation}, "
                f"the parameter server's is {self.setup.generation}"
            )
        if not 0 <= worker < self.setup.workers:
            raise Refused(f"worker {worker} does not exist: there are {self.setup.workers}, counted from 0")

    def check_joined(self, worker: int, generation: int) -> None:
        """Refuse whoever could not push."""
        self.check_member(worker, generation)
        if worker not in self._joined:
            raise Conflict(f"{self._name(worker)} has not joined")

    def _check(self, push: Push) -> _Chunk:
        """The push's chunk, or the reason why the push is refused."""
        self.check_joined(push.worker, push.generation)
        if self.fault is not None:
            raise Conflict(self.fault)
        where = f"{self._name(push.worker)}, step {push.step}, offset {push.offset}"
        chunk = self._chunks.get(push.offset)
        if chunk is None:
            raise Refused(
                f"{where}: no chunk begins there; they begin at {self.setup.start} and every "
                f"{self.setup.chunk_elements} elements up to {self.setup.stop}"
            )
        needed = len(chunk.parameters) * (self._subtrees.rows[push.worker] if self._subtrees else 1)
        if len(push.gradient) != needed:
            raise Refused(f"{where}: {len(push.gradient)} elements, the chunk has {needed}")
        if self._mode.at_once:
            if push.worker in self._left:
                raise Conflict(f"{where}: {self._parted(push.worker)}")
            applied = chunk.clocks.done[push.worker]
            if push.step not in (applied, applied + 1) or push.step == 0:
                raise Conflict(f"{where}: this worker is at step {applied + 1}")
        else:
            applied = chunk.step
            if push.step not in (applied, self.step + 1) or push.step == 0:
                raise Conflict(f"{where}: the shard is at step {self.step + 1}")
        if applied == push.step:
            return chunk
        if push.samples < 1:
            raise Refused(f"{where}: {push.samples} samples in the batch, at least 1 is needed")
        if not (math.isfinite(push.learning_rate) and push.learning_rate >= 0):
            raise Refused(f"{where}: learning rate {push.learning_rate} is not a finite number of at least 0")
        if not 0 <= push.share <= push.samples:
            raise Refused(f"{where}: a share of {push.share} samples in a batch of {push.samples}")
        self._check_agreement(push, where)
        if not np.isfinite(push.gradient).all():
            element = push.offset + int(np.argmin(np.isfinite(push.gradient))) % len(chunk.parameters)
            raise Refused(f"{where}: the gradient is not finite at element {element}: lower the learning rate")
        if not self._mode.at_once:
            for worker in self._left:
                raise Conflict(f"{where}: {self._parted(worker)}")
        return chunk

    def _check_agreement(self, push: Push, where: str) -> None:
        """Every push of a step states the same batch and rate, and as many totals."""
        if push.totals and push.offset != self.setup.start:
            raise Refused(f"{where}: totals ride on the chunk at {self.setup.start} only")
        if self._subtrees and not self._subtrees.fits(push.worker, len(push.totals)):
            shards = self._subtrees.shards[push.worker]
            raise Refused(
                f"{where}: {len(push.totals)} totals, which is not as many for each of {shards} virtual shards"
            )
        if self._terms is None:
            return
        first = self._terms
        for name, given, agreed in (
            ("samples", push.samples, first.samples),
            ("learning rate", push.learning_rate, first.learning_rate),
        ):
            if given != agreed:
                raise Refused(f"{where}: {name} {given}, but {self._name(first.worker)} said {agreed}")
        for other in self._chunks[push.offset].held.values():
            if not self._same_totals(other, push):
                raise Refused(
                    f"{where}: {len(push.totals)} totals, but {self._name(other.worker)} sent {len(other.totals)}"
                )

    def _receive_at_once(self, chunk: _Chunk, push: Push, now: float) -> list[Answer]:
        """Apply a worker's own step on its own; answer all whom it lets go on."""
        clocks, worker = chunk.clocks, push.worker
        if clocks.done[worker] == push.step:
            return [] if worker in clocks.waiting else [self._answer_one(chunk, worker, 0.0)]
        if push.share:
            mean = np.divide(push.gradient, np.float32(push.share), out=self._sum[: len(push.gradient)])
            rate = push.learning_rate * push.share / push.samples * self._mode.rate_factor(clocks.staleness(worker))
            count = chunk.updates_before + clocks.updates + 1
            self._optimizer.update(chunk.parameters, mean, chunk.state, count, rate, chunk.decayed)
        clocks.advance(worker, now)
        if chunk.offset == self.setup.start:
            self._newest[worker] = push._replace(gradient=self._sum[:0])
        self.step = self.version[0]
        return self._released(chunk)

    def _released(self, chunk: _Chunk) -> list[Answer]:
        return [self._answer_one(chunk, *ready) for ready in chunk.clocks.release(self._mode.lead_steps)]

    def _answer_one(self, chunk: _Chunk, worker: int, staleness: float) -> Answer:
        """For a worker with its own clock; its totals are the workers' newest, scaled to the whole batch."""
        totals: tuple[float, ...] = ()
        if chunk.offset == self.setup.start and worker in self._newest:
            newest, size = self._newest.values(), len(self._newest[worker].totals)
            shares = sum(push.share for push in newest)
            factor = self._newest[worker].samples / shares if shares else 1.0
            sums = (
                math.fsum(column) for column in zip(*(p.totals for p in newest if len(p.totals) == size), strict=True)
            )
            totals = tuple(factor * total for total in sums)
        return Answer((worker,), chunk.clocks.done[worker], chunk.offset, chunk.parameters, totals, staleness)

    def _expire_clocks(self, now: float) -> None:
        """Give up where a worker waits too long for slower ones to come near."""
        for chunk in self._chunks.values():
            done = chunk.clocks.done
            for worker, (since, _) in chunk.clocks.waiting.items():
                if now - since > self.setup.step_timeout_seconds:
                    late = [other for other in sorted(done) if done[worker] - done[other] > self._mode.lead_steps]
                    self.fault = self.fault or (
                        f"step {done[worker]} of {self._name(worker)} waited {now - since:.1f} s for "
                        + " and ".join(self._name(other) for other in late)
                    )

    def _sum_up(self, chunk: _Chunk, samples: int) -> None:
        """Sum in worker order, divide by the batch."""
        pushes = [chunk.held[worker] for worker in sorted(chunk.held)]
        place = chunk.offset - self.setup.start if self._waits_for_all else 0
        chunk.mean = mean = self._sum[place : place + len(chunk.parameters)]
        if self._subtrees:
            total = self._subtrees.total([push.gradient for push in pushes], len(mean))
        else:
            total = pushes[0].gradient
            for other in pushes[1:]:
                total = np.add(total, other.gradient, out=mean)
        np.divide(total, np.float32(samples), out=mean)
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

    def _apply(self, chunk: _Chunk, push: Push) -> Answer:
        """Run the optimizer on this chunk; the answer is for all whose push was held."""
        assert chunk.mean is not None
        workers = tuple(sorted(chunk.held))
        self._optimizer.update(chunk.parameters, chunk.mean, chunk.state, push.step, push.learning_rate, chunk.decayed)
        if chunk.offset == self.setup.start:
            self._totals = self._summed_totals([chunk.held[worker].totals for worker in workers])
        chunk.held.clear()
        chunk.mean = None
        chunk.step = push.step
        if all(other.step == push.step for other in self._chunks.values()):
            self.step, self._terms = push.step, None
        return self._answer(chunk, workers)

    def _same_totals(self, one: Push, other: Push) -> bool:
        if self._subtrees:
            return self._subtrees.agree(one.worker, len(one.totals), other.worker, len(other.totals))
        return len(one.totals) == len(other.totals)

    def _summed_totals(self, pushed: list[tuple[float, ...]]) -> tuple[float, ...]:
        if self._subtrees:
            return self._subtrees.totals(pushed)
        return tuple(math.fsum(column) for column in zip(*pushed, strict=True))

    def _answer(self, chunk: _Chunk, workers: tuple[int, ...]) -> Answer:
        totals = self._totals if chunk.offset == self.setup.start else ()
        return Answer(workers, chunk.step, chunk.offset, chunk.parameters, totals)

    def _name(self, worker: int) -> str:
        return f"worker {worker} of {self.setup.workers}"

    def _parted(self, worker: int) -> str:
        return f"{self._name(worker)} left after step {self._left[worker]}, the others went on to the next"
