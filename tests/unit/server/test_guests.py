"""What becomes of one guest of a synchronous shard: taken in, waited for, dropped, refused."""

import math
from collections.abc import Iterator

import numpy as np
import pytest

from protos import job_pb2
from worker.optimizers import make_optimizer
from worker.server.pushes import MOST_GUESTS, NO_GUESTS, Answer, Apart, Conflict, Push, Refused, ShardSetup
from worker.server.shard import Shard

COUNT, CHUNK, BATCH, LEASE, PATIENCE = 6, 3, 8, 5.0, 60.0
OFFSETS = (3, 0)  # in the order in which they are pushed


def new_shard(**changes: object) -> Shard:
    terms = {"generation": 2, "chunk_elements": CHUNK, "guests": True, "lease_seconds": LEASE,
             "step_timeout_seconds": PATIENCE, **changes}  # fmt: skip
    optimizer = make_optimizer(job_pb2.Optimizer(sgd=job_pb2.SgdOptimizer(learning_rate=1.0)))
    setup = ShardSetup(COUNT, "digest", 1, **terms)
    shard = Shard(setup, optimizer, np.zeros(setup.stop - setup.start, np.float32), {})
    shard.join(0, 2, COUNT, "digest")
    return shard


def push_of(worker: int, step: int, offset: int, share: int, guests: tuple[int, ...] = (1,), **changes: object) -> Push:
    gradient = np.full(CHUNK, float(share * (worker + 1)), np.float32)
    rate = 0.0 if worker else 1.0
    push = Push(worker, 2, step, offset, BATCH, rate, gradient, (float(share),) * (offset == 0), share, guests)
    return push._replace(**changes)


def push_all(shard: Shard, worker: int, step: int, share: int, guests: tuple[int, ...] = (1,)) -> list[Answer]:
    return [answer for o in OFFSETS for answer in shard.receive(push_of(worker, step, o, share, guests), 0.0)]


@pytest.fixture
def shard() -> Iterator[Shard]:
    """Of one founding worker, at step 3, which guest 1 is named for; both take half of a batch."""
    made = new_shard()
    assert made.welcome(-1, 2, COUNT, "digest", 0, 0.0) == 1
    made.open(1, 2, 0.0)
    for step in (1, 2):
        answers = push_all(made, 0, step, BATCH, ())
    assert answers[-1].guests == (1,)
    assert answers[-1].workers == (0, 1)
    made.parameters[:] = 0
    return made


def test_the_mean_is_over_the_samples_of_all_who_take_part(shard) -> None:
    assert push_all(shard, 1, 3, 4) == []
    answers = push_all(shard, 0, 3, 4)
    assert [(answer.workers, answer.step, answer.samples) for answer in answers] == [((0, 1), 3, 0), ((0, 1), 3, BATCH)]
    np.testing.assert_array_equal(shard.parameters, np.full(COUNT, -(4 * 2 + 4) / 8))


def test_a_guests_push_that_is_repeated_is_applied_once_and_answered_again(shard) -> None:
    push_all(shard, 1, 3, 4)
    assert push_all(shard, 1, 3, 4) == []
    push_all(shard, 0, 3, 4)
    before = shard.parameters.copy()
    assert [answer.workers for answer in push_all(shard, 1, 3, 4)] == [(1,), (1,)]
    np.testing.assert_array_equal(shard.parameters, before)


@pytest.mark.parametrize("how", ["lost", "silent", "slow"])
def test_a_chunk_that_waited_for_a_dropped_guest_alone_is_completed_without_it(shard, how) -> None:
    shard.receive(push_of(1, 3, 3, 4), 0.0)  # one of its two chunks
    push_all(shard, 0, 3, 4)
    if how == "lost":
        answers = shard.lose(1, "its stream ended")
    elif how == "silent":
        answers = shard.expire(LEASE + 1)
    else:
        shard.hear(1, PATIENCE + 1)
        answers = shard.expire(PATIENCE + 1)
    assert [(answer.workers, answer.offset, answer.samples, answer.guests) for answer in answers] == [((0,), 0, 4, ())]
    assert answers[0].dropped_guests == 1
    # The chunk it has pushed has all 8 samples, the other only those of the founding worker.
    np.testing.assert_array_equal(shard.parameters, [-1.0] * 3 + [-1.5] * 3)
    (news,) = [news for news in shard.take_news() if news.dropped]
    why = {
        "lost": "its stream ended",
        "silent": "it was silent for 6.0 s",
        "slow": "its gradient was waited for 61.0 s",
    }
    assert news == (f"guest 1 was dropped in step 3: {why[how]}", 1)
    assert (shard.fault, shard.step) == (None, 3)
    with pytest.raises(Apart, match=r"guest 1 was dropped in step 3: .*; join again"):
        shard.receive(push_of(1, 3, 0, 4), 0.0)


def test_while_a_guest_is_heard_its_lease_is_renewed(shard) -> None:
    push_all(shard, 0, 3, 4)
    for now in (4.0, 8.0, 12.0):
        shard.hear(1, now)
        assert shard.expire(now + 4) == []
    assert push_all(shard, 1, 3, 4)


def test_a_step_that_waits_for_a_founding_worker_is_timed_from_its_own_first_push_not_a_guests(shard) -> None:
    push_all(shard, 1, 3, 4)
    shard.hear(1, 10 * PATIENCE)
    shard.expire(10 * PATIENCE)
    assert shard.fault is None
    shard.receive(push_of(0, 3, 3, 4), 10 * PATIENCE)
    shard.hear(1, 12 * PATIENCE)
    shard.expire(12 * PATIENCE)
    assert shard.fault == "step 3 waited 120.0 s for the gradient of worker 0 of 1"


def test_a_guest_that_leaves_is_waited_for_once_more_and_named_no_more(shard) -> None:
    assert shard.leave(1, 2) == []
    assert push_all(shard, 0, 3, 4) == []
    answers = push_all(shard, 1, 3, 4)
    assert answers[-1].guests == ()
    assert shard.lose(1, "its stream ended") == []
    assert [news.line for news in shard.take_news()][-1] == "guest 1 has left before step 4"
    assert len(push_all(shard, 0, 4, BATCH, ())) == 2


def test_guests_of_a_shard_that_died_are_not_waited_for(shard) -> None:
    fresh = new_shard(restored=True)
    assert fresh.step == 0
    assert len(push_all(fresh, 0, 1, 4, (1, 7))) == 2
    np.testing.assert_array_equal(fresh.parameters, np.full(COUNT, -1.0))


def test_a_guest_waited_for_alone_is_dropped_where_all_chunks_wait_for_the_norm() -> None:
    shard = new_shard(clip_norm=1.0)
    shard.welcome(-1, 2, COUNT, "digest", 0, 0.0)
    shard.open(1, 2, 0.0)
    for step in (1, 2):
        push_all(shard, 0, step, BATCH, ())
    push_all(shard, 0, 3, 4)
    shard.receive(push_of(1, 3, 3, 4), 0.0)
    assert [answer.step for answer in shard.lose(1, "gone")] == [3, 3]


def test_when_the_founding_workers_have_left_the_job_is_over_whoever_has_pushed(shard) -> None:
    push_all(shard, 1, 3, 4)
    shard.leave(0, 2)
    assert (shard.members.over, shard.fault) == (True, None)
    with pytest.raises(Conflict, match="the job is over"):
        shard.welcome(-1, 2, COUNT, "digest", 0, 0.0)


REFUSED = [
    ("guest 1, step 3, offset 3: its batch was cut for the guests \\[4\\]", Refused, {"guests": (4,)}),
    ("guest 1, step 9, offset 3: the shard is at step 3", Conflict, {"step": 9}),
    ("worker 1 is of an earlier launch: generation 1", Conflict, {"generation": 1}),
    ("guest 5 is not known here; join again", Apart, {"worker": 5}),
    ("guest 1, step 3, offset 3: a share of 9 samples", Refused, {"share": 9}),
    ("the gradient is not finite at element 3", Refused, {"gradient": np.full(CHUNK, np.nan, np.float32)}),
    ("offset 0: 2 totals, but the founding workers send 1", Refused, {"offset": 0, "totals": (1.0, 2.0)}),
    ("offset 0: 0 totals, but the founding workers send 1", Refused, {"offset": 0, "totals": ()}),
    ("offset 0: total 0 is nan, which is not a finite number", Refused, {"offset": 0, "totals": (math.nan,)}),
    ("offset 0: total 0 is -1e\\+308, which is not a finite number", Refused, {"offset": 0, "totals": (-1e308,)}),
]


@pytest.mark.parametrize(("words", "kind", "changes"), REFUSED)
def test_a_guests_push_that_is_refused_changes_nothing(shard, words, kind, changes) -> None:
    before = shard.version, shard.parameters.tobytes()
    with pytest.raises(kind, match=words):
        shard.receive(push_of(1, 3, 3, 4)._replace(**changes), 0.0)
    assert (shard.version, shard.parameters.tobytes()) == before
    push_all(shard, 1, 3, 4)
    assert len(push_all(shard, 0, 3, 4)) == 2


def test_a_guest_that_pushes_before_any_founding_worker_is_sent_to_join_again() -> None:
    shard = new_shard()
    shard.welcome(-1, 2, COUNT, "digest", 0, 0.0)
    shard.open(1, 2, 0.0)
    with pytest.raises(Conflict, match="no founding worker has pushed here yet; join again"):
        shard.receive(push_of(1, 1, 0, 4), 0.0)


def test_who_cannot_be_a_guest_is_told_why(shard) -> None:
    welcome = (2, COUNT, "digest", 0, 0.0)
    with pytest.raises(Conflict, match=NO_GUESTS[:20]):
        new_shard(guests=False).welcome(-1, *welcome)
    with pytest.raises(Conflict, match="earlier launch"):
        shard.welcome(-1, 1, *welcome[1:])
    with pytest.raises(Conflict, match="the guest has a model of 7 parameters"):
        shard.welcome(-1, 2, 7, "digest", 0, 0.0)
    with pytest.raises(Refused, match="guest 2147483647 is no number that was given: join with -1"):
        shard.welcome(2**31 - 1, *welcome)
    other = new_shard(start=3)
    with pytest.raises(Refused, match="ask that one first"):
        other.welcome(-1, *welcome)
    with pytest.raises(Refused, match="guest 0 cannot be: numbers below 1"):
        other.welcome(0, *welcome)
    assert other.welcome(1, *welcome) == 1
    with pytest.raises(Apart, match="guest 1 is here already"):
        other.welcome(1, *welcome)
    for _ in range(MOST_GUESTS - 1):
        shard.welcome(-1, *welcome)
    with pytest.raises(Apart, match=f"{MOST_GUESTS} guests already"):
        shard.welcome(-1, *welcome)
