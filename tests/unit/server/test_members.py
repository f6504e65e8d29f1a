"""Guests of a synchronous job on two shards, in any interleaving: batches are cut alike, no step waits for ever.

The workers here are models of ParameterServerExchange and GuestExchange that hand pushes to two shards in any order;
hypothesis decides who acts when, who comes, leaves, dies or falls silent, and which shard notices first.
"""

import functools

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from protos import job_pb2
from worker.data.sharding import share
from worker.optimizers import Optimizer, make_optimizer
from worker.server.pushes import Answer, Apart, Push, ShardSetup
from worker.server.shard import Shard

COUNT, CHUNK, CUT, FOUNDERS, BATCH, RATE = 8, 2, 4, 2, 12, 0.1
LEASE, PATIENCE = 5.0, 60.0
CHUNKS = {0: (2, 0), 1: (6, 4)}  # shard -> its chunks, in the order in which they are pushed


def sgd() -> Optimizer:
    return make_optimizer(job_pb2.Optimizer(sgd=job_pb2.SgdOptimizer(learning_rate=RATE)))


def new_shard(index: int, **changes: object) -> Shard:
    start, stop = ((0, CUT), (CUT, COUNT))[index]
    terms = {"generation": 2, "chunk_elements": CHUNK, "start": start, "stop": stop, "guests": True,
             "lease_seconds": LEASE, "step_timeout_seconds": PATIENCE, **changes}  # fmt: skip
    shard = Shard(ShardSetup(COUNT, "digest", FOUNDERS, **terms), sgd(), np.zeros(stop - start, np.float32), {})
    for worker in range(FOUNDERS):
        shard.join(worker, 2, COUNT, "digest")
    return shard


@functools.cache
def samples_of(step: int) -> np.ndarray:
    """The gradient of each sample of a batch, (BATCH, COUNT)."""
    return np.random.default_rng(step).standard_normal((BATCH, COUNT)).astype(np.float32)


@functools.cache
def weights_after(step: int) -> np.ndarray:
    """Of one worker alone, which computes whole batches."""
    if step == 0:
        return np.zeros(COUNT)
    return weights_after(step - 1) - RATE * samples_of(step).mean(axis=0, dtype=np.float64)


def welcome(shard: Shard, number: int = -1, now: float = 0.0) -> int:
    return shard.welcome(number, 2, COUNT, "digest", 0, now)


class Worker:
    """A founding worker, or a guest that listens until it is named."""

    def __init__(self, number: int, founding: bool) -> None:
        self.number, self.founding = number, founding
        self.alive, self.leaving, self.taking_part = True, False, founding
        self.step = 0  # done
        self.guests: tuple[int, ...] = ()
        self.weights = np.zeros(COUNT, np.float32)
        self.got = {offset: 0 for offsets in CHUNKS.values() for offset in offsets}  # chunk -> step of its weights
        self.told: dict[int, tuple[int, ...]] = {}  # step -> the guests of the one behind it
        self.to_push = {index: list(offsets) for index, offsets in CHUNKS.items()}

    def take(self, answer: Answer) -> None:
        self.weights[answer.offset : answer.offset + CHUNK] = answer.weights
        self.got[answer.offset] = answer.step
        if answer.offset == 0:
            self.told[answer.step] = answer.guests
            if not self.taking_part and self.number in answer.guests:
                self.step, self.taking_part = answer.step - 1, True
                self.to_push = {0: [], 1: []}
        if self.taking_part and all(step == self.step + 1 for step in self.got.values()):
            self.step += 1
            self.guests = self.told[self.step]
            self.to_push = {index: list(offsets) for index, offsets in CHUNKS.items()}
            if self.leaving and self.number not in self.guests:
                self.alive = False

    def push(self, offset: int) -> Push:
        guests = self.guests
        place = self.number if self.founding else FOUNDERS + guests.index(self.number)
        low, high = share(0, BATCH, place, FOUNDERS + len(guests))
        gradient = samples_of(self.step + 1)[low:high].sum(axis=0)[offset : offset + CHUNK]
        totals = (float(high - low),) if offset == 0 else ()
        rate = RATE if self.founding else 0.0
        return Push(self.number, 2, self.step + 1, offset, BATCH, rate, gradient, totals, high - low, guests)


class Coming(RuleBasedStateMachine):
    """Two shards, two founding workers and up to four guests at a time."""

    @initialize()
    def begin(self) -> None:
        self.shards = [new_shard(0), new_shard(1)]
        self.workers = {number: Worker(number, True) for number in range(FOUNDERS)}
        self.opening: dict[int, int] = {}  # guest -> how many of its streams are open, the authority's last
        self.unnoticed: set[tuple[int, int]] = set()  # (shard, guest) whose stream is over
        self.dropped = False
        self.now = 0.0

    def spread(self, index: int, answers: list[Answer]) -> None:
        for answer in answers:
            for number in answer.workers:
                worker = self.workers.get(number)
                if worker is not None and worker.alive and (worker.founding or self.opening[number] > 1 - index):
                    worker.take(answer)
        for worker in self.workers.values():
            if not worker.alive and worker.leaving:
                self.end(worker)
        for news in self.shards[index].take_news():
            if news.dropped is not None:
                self.end(self.workers[news.dropped])
                self.unnoticed.discard((index, news.dropped))
                self.dropped = True

    def end(self, worker: Worker) -> None:
        """Its streams are over, and each shard notices when it does."""
        worker.alive = False
        here = {(index, worker.number) for index in (0, 1) if worker.number in self.shards[index].members.guests}
        self.unnoticed |= here

    def guests(self) -> list[int]:
        return [number for number, worker in self.workers.items() if worker.alive and not worker.founding]

    def send(self, number: int, index: int) -> bool:
        worker = self.workers[number]
        if not (worker.alive and worker.taking_part and worker.to_push[index]):
            return False
        push = worker.push(worker.to_push[index].pop(0))
        self.spread(index, self.shards[index].receive(push, self.now))
        return True

    @rule(worker=st.integers(0, FOUNDERS - 1), index=st.integers(0, 1), count=st.integers(1, 2))
    def founder_pushes(self, worker: int, index: int, count: int) -> None:
        for _ in range(count):
            self.send(worker, index)

    @rule(index=st.integers(0, 1), count=st.integers(1, 2))
    def founders_push_to_one_shard(self, index: int, count: int) -> None:
        for worker in range(FOUNDERS):
            self.founder_pushes(worker, index, count)

    @rule(data=st.data(), index=st.integers(0, 1), count=st.integers(1, 4))
    def guests_push(self, data: st.DataObject, index: int, count: int) -> None:
        if numbers := self.guests():
            number = data.draw(st.sampled_from(numbers))
            for _ in range(count):
                self.send(number, index)

    @rule(steps=st.integers(1, 2))
    def everybody_goes_on(self, steps: int) -> None:
        for _ in range(3 * steps):
            for number in list(self.workers):
                for index in (0, 1):
                    self.send(number, index)

    @precondition(lambda self: len(self.guests()) < 4)
    @rule(streams=st.integers(0, 2))
    def join(self, streams: int) -> None:
        number = welcome(self.shards[0], now=self.now)
        assert welcome(self.shards[1], number, self.now) == number
        self.workers[number] = Worker(number, False)
        self.opening[number] = 0
        for _ in range(streams):
            self.open(number)

    @rule(data=st.data())
    def open_stream(self, data: st.DataObject) -> None:
        if waiting := [number for number in self.guests() if self.opening[number] < 2]:
            self.open(data.draw(st.sampled_from(waiting)))

    def open(self, number: int) -> None:
        index = 1 - self.opening[number]
        self.opening[number] += 1
        self.shards[index].open(number, 2, self.now)

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        numbers = [n for n in self.guests() if self.workers[n].taking_part and len(self.workers[n].to_push[0]) == 2]
        if numbers:
            worker = self.workers[data.draw(st.sampled_from(numbers))]
            worker.leaving = True
            for shard in self.shards:
                assert shard.leave(worker.number, 2) == []

    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        if numbers := self.guests():
            self.end(self.workers[data.draw(st.sampled_from(numbers))])
            self.dropped = True

    @rule(data=st.data())
    def notice(self, data: st.DataObject) -> None:
        if self.unnoticed:
            index, number = data.draw(st.sampled_from(sorted(self.unnoticed)))
            self.unnoticed.discard((index, number))
            self.spread(index, self.shards[index].lose(number, "its stream ended"))
            with pytest.raises(Apart, match=f"guest {number} (was dropped|left).*join again"):
                self.shards[index].leave(number, 2)

    @rule(data=st.data(), index=st.integers(0, 1))
    def fall_silent(self, data: st.DataObject, index: int) -> None:
        """One shard no longer hears a guest whose stream is open; all others are heard."""
        numbers = [number for number in self.guests() if self.opening[number] == 2]
        if numbers:
            silent = data.draw(st.sampled_from(numbers))
            self.now += LEASE + 1
            for number in self.workers:
                if number != silent:
                    for shard in self.shards:
                        shard.hear(number, self.now)
            self.shards[1 - index].hear(silent, self.now)
            self.spread(index, self.shards[index].expire(self.now))
            assert silent not in self.shards[index].members.guests

    @invariant()
    def no_fault_and_while_nobody_is_dropped_the_weights_are_those_of_one_worker_alone(self) -> None:
        if not hasattr(self, "shards"):
            return
        for shard in self.shards:
            assert shard.fault is None
            if not self.dropped:
                self.compare(shard)

    def compare(self, shard: Shard) -> None:
        if shard.version[1]:
            return
        here = slice(shard.setup.start, shard.setup.stop)
        np.testing.assert_allclose(shard.parameters, weights_after(shard.step)[here], rtol=1e-5, atol=1e-6)

    def teardown(self) -> None:
        """What is over is noticed, and then every step is completed: nobody waits for ever."""
        if not hasattr(self, "shards"):
            return
        for _ in range(2):
            before = [shard.step for shard in self.shards]
            for _ in range(12):
                for index, number in sorted(self.unnoticed):
                    self.unnoticed.discard((index, number))
                    self.spread(index, self.shards[index].lose(number, "its stream ended"))
                for number in list(self.workers):
                    for index in (0, 1):
                        self.send(number, index)
            assert all(shard.step > step + 1 for shard, step in zip(self.shards, before, strict=True))
        for worker in self.workers.values():
            if worker.alive and worker.taking_part and worker.step == self.shards[0].step:
                here = np.concatenate([shard.parameters for shard in self.shards])
                if not any(shard.version[1] for shard in self.shards):
                    np.testing.assert_array_equal(worker.weights, here)


TestComing = Coming.TestCase
TestComing.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
