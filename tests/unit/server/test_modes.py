"""Workers with clocks of their own: a state machine in any interleaving against a plain model of it."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from protos import job_pb2
from worker.optimizers import Optimizer, make_optimizer
from worker.server.modes import MODES, Mode, mode_of
from worker.server.pushes import Apart, Conflict, Push, Refused, ShardSetup
from worker.server.shard import Shard

COUNT, CHUNK, WORKERS, BATCH, RATE = 7, 4, 3, 12, 0.1
OFFSETS = (0, 4)
SHARES = (2, 4, 6)
GUEST_SHARE = 3
LEASE = 5.0


def sgd() -> Optimizer:
    return make_optimizer(job_pb2.Optimizer(sgd=job_pb2.SgdOptimizer(learning_rate=RATE)))


def new_shard(mode: Mode, timeout_seconds: float = 60.0) -> Shard:
    setup = ShardSetup(
        COUNT, "digest", WORKERS, generation=2, mode=mode, chunk_elements=CHUNK, step_timeout_seconds=timeout_seconds,
        guests=True, lease_seconds=LEASE,
    )  # fmt: skip
    shard = Shard(setup, sgd(), np.linspace(-1, 1, COUNT, dtype=np.float32), {})
    for worker in range(WORKERS):
        shard.join(worker, 2, COUNT, "digest")
    return shard


def gradient_of(worker: int, step: int) -> np.ndarray:
    return np.random.default_rng((worker, step)).standard_normal(COUNT).astype(np.float32)


def push_of(worker: int, step: int, offset: int, **changes: object) -> Push:
    totals = (float(share_of(worker)),) if offset == 0 else ()
    gradient = gradient_of(worker, step)[offset : offset + CHUNK]
    rate = RATE if worker < WORKERS else 0.0  # a guest's is that of the founding workers
    return Push(worker, 2, step, offset, BATCH, rate, gradient, totals, share_of(worker))._replace(**changes)


def share_of(worker: int) -> int:
    return SHARES[worker] if worker < WORKERS else GUEST_SHARE


def state_of(shard: Shard) -> tuple[object, ...]:
    return shard.version, shard.parameters.tobytes(), shard.fault


class Clocked(RuleBasedStateMachine):
    """Any order of pushes, repeats, refusals and leaves, with guests, in a bounded or an asynchronous shard."""

    @initialize(lead=st.sampled_from([0, 1, 3, np.inf]), scaled=st.booleans())
    def begin(self, lead: float, scaled: bool) -> None:
        self.lead, self.scaled = lead, scaled
        self.shard = new_shard(Mode(at_once=True, lead_steps=lead, scaled=scaled), timeout_seconds=1e6)
        self.weights = self.shard.parameters.copy()
        self.live = set(range(WORKERS))
        self.pushed = dict.fromkeys(((w, o) for w in range(WORKERS) for o in OFFSETS), 0)
        self.answered = dict(self.pushed)
        self.seen = dict(self.pushed)  # updates in the weights that the worker has
        self.updates = dict.fromkeys(OFFSETS, 0)
        self.stale: dict[tuple[int, int], float] = {}
        self.now = 0.0

    def take(self, answers) -> None:
        for answer in answers:
            (worker,) = answer.workers
            key = worker, answer.offset
            assert self.answered[key] + 1 == self.pushed[key] == answer.step
            assert answer.staleness == pytest.approx(self.stale[key])
            slowest = min(self.pushed[other, answer.offset] for other in self.live)
            assert answer.step - slowest <= self.lead
            assert answer.guests == (tuple(self.guests()) if answer.offset == 0 else ())
            self.answered[key] = answer.step
            self.seen[key] = self.updates[answer.offset]

    def guests(self) -> list[int]:
        return sorted(worker for worker in self.live if worker >= WORKERS)

    @rule()
    def a_guest_comes(self) -> None:
        if self.shard.awaits_founders or len(self.guests()) == 2:
            return
        number = self.shard.welcome(-1, 2, COUNT, "digest", 0, self.now)
        with pytest.raises(Conflict, match=f"guest {number} has not joined"):
            self.shard.receive(push_of(number, 1, 0), self.now)
        self.shard.open(number, 2, self.now)
        self.live.add(number)
        for offset in OFFSETS:
            self.pushed[number, offset] = self.answered[number, offset] = self.shard.version[0]
            self.seen[number, offset] = self.updates[offset]

    @rule(data=st.data(), offset=st.sampled_from(OFFSETS))
    def a_guest_pushes(self, data: st.DataObject, offset: int) -> None:
        if self.guests():
            self.push(data.draw(st.sampled_from(self.guests())), offset)

    @rule(data=st.data(), how=st.sampled_from(["leaves", "is lost", "is silent"]))
    def a_guest_goes(self, data: st.DataObject, how: str) -> None:
        if not self.guests():
            return
        worker = data.draw(st.sampled_from(self.guests()))
        self.live.discard(worker)
        if how == "is silent":
            self.now += LEASE + 0.1
            for other in self.live:
                self.shard.hear(other, self.now)
            self.take(self.shard.expire(self.now))
        else:
            self.take(self.shard.leave(worker, 2) if how == "leaves" else self.shard.lose(worker, "gone"))
        with pytest.raises(Apart, match=f"guest {worker} (left|was dropped).*; join again"):
            self.shard.receive(push_of(worker, self.pushed[worker, 0] + 1, 0), self.now)

    @rule(worker=st.integers(0, WORKERS - 1), offset=st.sampled_from(OFFSETS))
    def push(self, worker: int, offset: int) -> None:
        key = worker, offset
        if worker not in self.live or self.answered[key] < self.pushed[key]:
            return
        step = self.pushed[key] + 1
        self.stale[key] = stale = (self.updates[offset] - self.seen[key]) / max(1, len(self.live) - 1)
        rate = RATE * share_of(worker) / BATCH / (max(1, stale) if self.scaled else 1)
        here = slice(offset, offset + CHUNK)
        mean = gradient_of(worker, step)[here] / np.float32(share_of(worker))
        sgd().update(self.weights[here], mean, {}, step, rate, ())
        self.pushed[key] = step
        self.updates[offset] += 1
        self.take(self.shard.receive(push_of(worker, step, offset), self.now))

    @rule(worker=st.integers(0, WORKERS - 1), offset=st.sampled_from(OFFSETS))
    def repeat(self, worker: int, offset: int) -> None:
        key = worker, offset
        if worker not in self.live or not self.pushed[key]:
            return
        before = state_of(self.shard)
        answers = self.shard.receive(push_of(worker, self.pushed[key], offset), 0.0)
        assert [a.workers for a in answers] == ([(worker,)] if self.answered[key] == self.pushed[key] else [])
        assert state_of(self.shard) == before

    @rule(
        worker=st.integers(0, WORKERS - 1),
        change=st.sampled_from([
            {"generation": 1}, {"step": 99}, {"offset": 1}, {"share": BATCH + 1}, {"share": -1},
            {"gradient": np.full(CHUNK, np.nan, np.float32)}, {"gradient": np.zeros(CHUNK + 1, np.float32)},
        ]),
    )  # fmt: skip
    def refuse(self, worker: int, change: dict[str, object]) -> None:
        before = state_of(self.shard)
        push = push_of(worker, self.pushed[worker, 0] + 1, 0)._replace(**change)
        with pytest.raises(Refused):
            self.shard.receive(push, 0.0)
        assert state_of(self.shard) == before

    @rule(worker=st.integers(1, WORKERS - 1))
    def leave(self, worker: int) -> None:
        behind = any(self.answered[worker, o] < self.pushed[worker, o] for o in OFFSETS)
        if worker not in self.live or behind or self.pushed[worker, 0] != self.pushed[worker, 4]:
            return
        self.live.discard(worker)
        self.take(self.shard.leave(worker, 2))
        with pytest.raises(Conflict, match=f"worker {worker} of 3 left after step {self.pushed[worker, 0]}"):
            self.shard.receive(push_of(worker, self.pushed[worker, 0] + 1, 0), 0.0)

    @invariant()
    def every_push_is_applied_once_and_nobody_waits_for_the_slowest(self) -> None:
        if not hasattr(self, "shard"):
            return
        np.testing.assert_array_equal(self.shard.parameters, self.weights)
        for offset in OFFSETS:
            slowest = min(self.pushed[worker, offset] for worker in self.live)
            for worker in self.live:
                may_go_on = self.pushed[worker, offset] - slowest <= self.lead
                # That nobody is answered too early, `take` holds: a guest may come later who is further behind.
                assert self.answered[worker, offset] == self.pushed[worker, offset] or not may_go_on


TestClocked = Clocked.TestCase
TestClocked.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("mode", ["bounded_staleness", "asynchronous"])
def test_one_clock_of_all_workers_moves_the_weights_as_a_synchronous_step_does(mode: str) -> None:
    shards = new_shard(MODES[mode]), new_shard(MODES["synchronous"])
    for shard in shards:
        answers = [
            answer for offset in OFFSETS for worker in range(WORKERS)
            for answer in shard.receive(push_of(worker, 1, offset), 0.0)
        ]  # fmt: skip
        assert shard.version == (1, 0)
        assert [answer.totals for answer in answers if answer.offset == 0][-1] == (BATCH,)
    np.testing.assert_allclose(shards[0].parameters, shards[1].parameters, rtol=1e-6)


def test_totals_before_the_others_have_pushed_stand_for_the_whole_batch() -> None:
    (answer,) = new_shard(MODES["asynchronous"]).receive(push_of(0, 1, 0), 0.0)
    assert answer.totals == (BATCH,)


def test_a_worker_that_waits_too_long_for_slower_ones_names_them() -> None:
    shard = new_shard(MODES["bounded_staleness"], timeout_seconds=5.0)
    shard.receive(push_of(0, 1, 0), 10.0)
    shard.receive(push_of(2, 1, 0), 11.0)
    shard.expire(15.0)
    assert shard.fault is None
    shard.expire(15.5)
    assert shard.fault == "step 1 of worker 0 of 3 waited 5.5 s for worker 1 of 3"


def test_a_job_names_its_mode() -> None:
    sync = job_pb2.ParameterServerSync()
    assert mode_of(sync) == MODES["synchronous"]
    sync.mode.asynchronous.SetInParent()
    assert mode_of(sync) == MODES["asynchronous"]
    sync.mode.bounded_staleness.steps = 5
    assert mode_of(sync) == Mode(at_once=True, lead_steps=5, scaled=False)
