"""The shard with invented pushes: any order of arrival gives one result, and what is refused changes nothing."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos import job_pb2
from worker.optimizers import Optimizer, make_optimizer
from worker.server.pushes import Answer, Conflict, Push, Refused, ShardSetup
from worker.server.shard import Shard

COUNT, CHUNK, WORKERS, SAMPLES, RATE = 10, 4, 3, 7, 0.1
OFFSETS = (0, 4, 8)
DECAYED = ((1, 6), (9, 10))
ADAMW = job_pb2.Optimizer(
    adamw=job_pb2.AdamwOptimizer(learning_rate=RATE, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.5)
)


def adamw() -> Optimizer:
    return make_optimizer(ADAMW)


def new_shard(**changes: object) -> Shard:
    settings = {"generation": 2, "chunk_elements": CHUNK, "decayed": DECAYED, **changes}
    setup = ShardSetup(COUNT, "digest", WORKERS, **settings)
    weights = np.linspace(-1, 1, COUNT, dtype=np.float32)[setup.start : setup.stop].copy()
    shard = Shard(setup, adamw(), weights, adamw().init(len(weights), np.float32))
    for worker in range(WORKERS):
        shard.join(worker, 2, COUNT, "digest")
    return shard


def gradient_of(worker: int, step: int) -> np.ndarray:
    # Sizes far apart, so that another order of summation would give other bits.
    return (np.random.default_rng((worker, step)).standard_normal(COUNT) * 1000.0**worker).astype(np.float32)


def push_of(worker: int, step: int, offset: int, **changes: object) -> Push:
    push = Push(
        worker, 2, step, offset, SAMPLES, RATE / step, gradient_of(worker, step)[offset : offset + CHUNK],
        (worker + 0.5, 1.0) if offset == 0 else (),
    )  # fmt: skip
    return push._replace(**changes)


def snapshot(shard: Shard) -> tuple[object, ...]:
    arrays = (shard.parameters, *shard.state.values())
    return shard.version, shard.fault, *(array.tobytes() for array in arrays)


def finish(shard: Shard, step: int) -> None:
    for worker, offset in itertools.product(range(WORKERS), OFFSETS):
        shard.receive(push_of(worker, step, offset), 0.0)


def reference(steps: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The optimizer on the whole vector's mean gradient, added up in worker order."""
    weights = np.linspace(-1, 1, COUNT, dtype=np.float32)
    state = adamw().init(COUNT, np.float32)
    for step in range(1, steps + 1):
        total = gradient_of(0, step).copy()
        for worker in range(1, WORKERS):
            total += gradient_of(worker, step)
        adamw().update(weights, total / np.float32(SAMPLES), state, step, RATE / step, DECAYED)
    return weights, state


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_interleaving_gives_the_same_bits_and_one_answer_to_each_worker(data: st.DataObject) -> None:
    shard = new_shard()
    for step in (1, 2, 3):
        answers: list[Answer] = []
        for worker, offset in data.draw(st.permutations(list(itertools.product(range(WORKERS), OFFSETS)))):
            for answer in shard.receive(push_of(worker, step, offset), 0.0):
                answers.append(answer)
                assert answer.workers == tuple(range(WORKERS))
                assert answer.offset == offset
                assert answer.step == step
                assert answer.totals == ((4.5, 3.0) if offset == 0 else ())
        assert sorted(answer.offset for answer in answers) == list(OFFSETS)
        assert shard.version == (step, 0)
    weights, state = reference(3)
    np.testing.assert_array_equal(shard.parameters, weights)
    for name, array in state.items():
        np.testing.assert_array_equal(shard.state[name], array)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_repeated_push_is_applied_once_and_answered_again(data: st.DataObject) -> None:
    shard = new_shard()
    pairs = list(itertools.product(range(WORKERS), OFFSETS))
    applied: set[int] = set()
    seen: set[tuple[int, int]] = set()
    repeats = data.draw(st.lists(st.sampled_from(pairs), max_size=9))
    for worker, offset in data.draw(st.permutations(pairs + repeats)):
        before = shard.parameters[offset : offset + CHUNK].copy()
        answers = shard.receive(push_of(worker, 1, offset), 0.0)
        if offset in applied:
            assert [answer.workers for answer in answers] == [(worker,)]
            assert answers[0].totals == ((4.5, 3.0) if offset == 0 else ())
            np.testing.assert_array_equal(answers[0].weights, before)
        elif (worker, offset) in seen:
            assert answers == []
        seen.add((worker, offset))
        if all((other, offset) in seen for other in range(WORKERS)):
            applied.add(offset)
    np.testing.assert_array_equal(shard.parameters, reference(1)[0])


def test_a_shard_of_a_range_counts_from_the_whole_vectors_start() -> None:
    parts = [new_shard(start=0, stop=4), new_shard(start=4)]
    for worker, offset in itertools.product(range(WORKERS), OFFSETS):
        parts[offset >= 4].receive(push_of(worker, 1, offset), 0.0)
    np.testing.assert_array_equal(np.concatenate([part.parameters for part in parts]), reference(1)[0])


REFUSALS = [
    ("an earlier launch: generation 1, the parameter server's is 2", Conflict, {"generation": 1}),
    ("a later launch", Conflict, {"generation": 3}),
    ("worker 3 does not exist: there are 3", Refused, {"worker": 3}),
    ("worker -1 does not exist", Refused, {"worker": -1}),
    ("worker 1 of 3, step 0, offset 4: the shard is at step 2", Conflict, {"step": 0}),
    ("worker 1 of 3, step 3, offset 4: the shard is at step 2", Conflict, {"step": 3}),
    ("worker 1 of 3, step 2, offset 5: no chunk begins there", Refused, {"offset": 5}),
    ("offset 12: no chunk begins there", Refused, {"offset": 12}),
    ("offset -4: no chunk begins there", Refused, {"offset": -4}),
    ("worker 1 of 3, step 2, offset 4: 3 elements, the chunk has 4", Refused, {"gradient": np.zeros(3, np.float32)}),
    ("0 samples in the batch", Refused, {"samples": 0}),
    ("samples 8, but worker 0 of 3 said 7", Refused, {"samples": 8}),
    ("learning rate 0.25, but worker 0 of 3 said 0.05", Refused, {"learning_rate": 0.25}),
    ("learning rate nan is not", Refused, {"learning_rate": float("nan")}),
    ("totals ride on the chunk at 0 only", Refused, {"totals": (1.0,)}),
    ("1 totals, but worker 0 of 3 sent 2", Refused, {"offset": 0, "totals": (1.0,)}),
    *(
        (f"step 2, offset 4: the gradient is not finite at element {4 + place}", Refused, {"gradient": g})
        for place, g in (
            (2, np.array([1, 2, np.nan, 4], np.float32)),
            (0, np.array([np.inf, 2, 3, 4], np.float32)),
            (3, np.array([1, 2, 3, -np.inf], np.float32)),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("words", "kind", "changes"), REFUSALS, ids=[row[0] for row in REFUSALS])
def test_a_refused_push_says_why_and_changes_nothing(words: str, kind: type, changes: dict[str, object]) -> None:
    shard = new_shard()
    finish(shard, 1)
    for offset in (0, 4):
        shard.receive(push_of(0, 2, offset), 0.0)
    before = snapshot(shard)
    with pytest.raises(Refused, match=words) as refusal:
        shard.receive(push_of(1, 2, 4)._replace(**changes), 0.0)
    assert type(refusal.value) is kind
    assert snapshot(shard) == before
    finish(shard, 2)
    np.testing.assert_array_equal(shard.parameters, reference(2)[0])


def test_a_refused_first_push_does_not_set_the_steps_terms() -> None:
    shard = new_shard()
    with pytest.raises(Refused, match="not finite"):
        shard.receive(push_of(0, 1, 0, samples=99, gradient=np.full(CHUNK, np.nan, np.float32)), 0.0)
    finish(shard, 1)
    np.testing.assert_array_equal(shard.parameters, reference(1)[0])


def test_a_push_of_the_next_step_waits_for_the_end_of_this_one() -> None:
    shard = new_shard()
    for worker in range(WORKERS):
        shard.receive(push_of(worker, 1, 8), 0.0)
    assert shard.version == (0, 1)
    with pytest.raises(Conflict, match="worker 0 of 3, step 2, offset 8: the shard is at step 1"):
        shard.receive(push_of(0, 2, 8), 0.0)


def test_a_worker_must_join_before_it_pushes() -> None:
    setup = ShardSetup(COUNT, "digest", 1, chunk_elements=CHUNK)
    shard = Shard(setup, adamw(), np.zeros(COUNT, np.float32), adamw().init(COUNT, np.float32))
    with pytest.raises(Conflict, match="worker 0 of 1 has not joined"):
        shard.receive(push_of(0, 1, 0, generation=1), 0.0)


def test_another_model_cannot_join() -> None:
    with pytest.raises(Conflict, match="start every worker with the same job file"):
        new_shard().join(0, 2, COUNT, "another")
    with pytest.raises(Conflict, match="model of 11 parameters"):
        new_shard().join(0, 2, COUNT + 1, "digest")


def test_a_lost_worker_ends_the_job_by_name() -> None:
    shard = new_shard()
    shard.receive(push_of(0, 1, 0), 0.0)
    shard.lose(2, "its stream ended")
    shard.lose(1, "later losses follow from the first")
    assert shard.fault == "worker 2 of 3 is gone at step 1: its stream ended"
    before = snapshot(shard)
    with pytest.raises(Conflict, match="worker 2 of 3 is gone"):
        shard.receive(push_of(1, 1, 0), 0.0)
    assert snapshot(shard) == before


def test_a_worker_that_left_is_not_lost() -> None:
    shard = new_shard()
    finish(shard, 1)
    for worker in range(WORKERS):
        shard.leave(worker, 2)
        shard.lose(worker, "its stream ended")
    assert shard.fault is None


def test_a_worker_that_leaves_during_a_step_ends_it() -> None:
    shard = new_shard()
    shard.receive(push_of(0, 1, 0), 0.0)
    shard.leave(1, 2)
    assert shard.fault == "worker 1 of 3 left after step 0, the others went on to the next"


def test_a_step_that_waits_too_long_names_whom_it_waits_for() -> None:
    shard = new_shard(step_timeout_seconds=5.0)
    shard.expire(1000.0)
    for offset in OFFSETS:
        shard.receive(push_of(1, 1, offset), 10.0 + offset)
    shard.expire(15.0)
    assert shard.fault is None
    shard.expire(15.1)
    assert shard.fault == "step 1 waited 5.1 s for the gradient of worker 0 of 3 and worker 2 of 3"


def test_the_clock_of_a_step_begins_at_its_own_first_push() -> None:
    shard = new_shard(step_timeout_seconds=5.0)
    finish(shard, 1)
    shard.expire(1000.0)
    shard.receive(push_of(0, 2, 0), 1000.0)
    shard.expire(1004.0)
    assert shard.fault is None


def back_from_a_snapshot(*steps: int) -> Shard:
    """A shard whose process died, with the snapshot of step 4, joined by workers at `steps`."""
    setup = ShardSetup(COUNT, "digest", WORKERS, generation=2, chunk_elements=CHUNK, decayed=DECAYED, restored=True)
    shard = Shard(setup, adamw(), np.zeros(COUNT, np.float32), adamw().init(COUNT, np.float32), step=4)
    for worker, step in enumerate(steps):
        shard.join(worker, 2, COUNT, "digest", step)
    return shard


def test_a_shard_back_from_its_snapshot_waits_for_all_workers_and_goes_on_at_their_step() -> None:
    shard = back_from_a_snapshot(9, 9)
    assert shard.awaits_workers
    shard.join(1, 2, COUNT, "digest", 9)  # told twice is told once
    assert shard.awaits_workers
    shard.join(2, 2, COUNT, "digest", 9)
    assert not shard.awaits_workers
    assert (shard.version, shard.restored_step) == ((9, 0), 4)
    finish(shard, 10)
    assert shard.version == (10, 0)
    assert shard.fault is None


def test_a_worker_that_had_no_answer_to_its_last_push_gets_the_weights_there_are() -> None:
    shard = back_from_a_snapshot(9, 8, 9)
    before = snapshot(shard)
    (answer,) = shard.receive(push_of(1, 9, 4), 0.0)
    assert (answer.workers, answer.step, answer.offset) == ((1,), 9, 4)
    assert snapshot(shard) == before
    finish(shard, 10)
    assert shard.version == (10, 0)


def test_a_worker_that_had_no_answer_is_told_the_totals_that_the_others_were() -> None:
    """Or it alone would not know of the report, the checkpoint or the stop that they ask for."""
    setup = ShardSetup(COUNT, "digest", WORKERS, generation=2, chunk_elements=CHUNK, decayed=DECAYED, restored=True)
    shard = Shard(setup, adamw(), np.zeros(COUNT, np.float32), adamw().init(COUNT, np.float32), step=4)
    shard.join(0, 2, COUNT, "digest", 9, (24, (1.5, 2.0)))
    shard.join(1, 2, COUNT, "digest", 8, (16, (9.0, 9.0)))
    shard.join(2, 2, COUNT, "digest", 9, (24, (1.5, 2.0)))
    (answer,) = shard.receive(push_of(1, 9, 0), 0.0)
    assert (answer.samples, answer.totals) == (24, (1.5, 2.0))


@pytest.mark.parametrize("steps", [(9, 7, 9), (3, 3, 3)])
def test_workers_further_apart_than_a_step_or_behind_the_snapshot_are_a_fault(steps: tuple[int, ...]) -> None:
    shard = back_from_a_snapshot(*steps)
    assert shard.fault is not None
    assert "back from its snapshot after step 4" in shard.fault


def test_a_shard_that_never_died_keeps_its_step_whatever_a_worker_says() -> None:
    shard = new_shard()
    for worker in range(WORKERS):
        shard.join(worker, 2, COUNT, "digest", 7)
    assert shard.version == (0, 0)
