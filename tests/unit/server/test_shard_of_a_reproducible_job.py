"""The shard with pushes of subtrees: any number of workers and any order of arrival give the same bits."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.server.test_shard import CHUNK, COUNT, DECAYED, OFFSETS, RATE, SAMPLES, adamw
from tests.unit.worker.test_reduction_tree import folded, whole
from worker.optimizers import Optimizer
from worker.server.pushes import Push, Refused, ShardSetup
from worker.server.shard import Shard
from worker.sync.reduction_tree import own_shards

SHARDS = 5
LEAVES = (
    np.random.default_rng(3).standard_normal((SHARDS, COUNT)) * 1000.0 ** np.arange(SHARDS)[:, None] / 1e4
).astype(np.float32)


def new_shard(workers: int, clip_norm: float = 0.0, optimizer: Optimizer | None = None) -> Shard:
    setup = ShardSetup(
        COUNT, "digest", workers, chunk_elements=CHUNK, decayed=DECAYED, clip_norm=clip_norm, virtual_shards=SHARDS
    )
    weights = np.linspace(-1, 1, COUNT, dtype=np.float32)
    shard = Shard(setup, optimizer or adamw(), weights, adamw().init(COUNT, np.float32))
    for worker in range(workers):
        shard.join(worker, 1, COUNT, "digest")
    return shard


def push_of(worker: int, workers: int, offset: int) -> Push:
    own = range(*own_shards(SHARDS, worker, workers))
    rows = [values[offset : offset + CHUNK] for _, values in folded(LEAVES, own.start, own.stop)]
    gradient = np.concatenate(rows) if rows else np.empty(0, np.float32)
    totals = tuple(value for shard in own for value in (shard + 0.1, 1.0)) if offset == 0 else ()
    return Push(worker, 1, 1, offset, SAMPLES, RATE, gradient, totals)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from([0.0, 0.3]))
def test_any_number_of_workers_in_any_order_gives_the_tree_s_bits(data: st.DataObject, clip_norm: float) -> None:
    alone, workers = new_shard(1, clip_norm), data.draw(st.integers(1, 7))
    shard = new_shard(workers, clip_norm)
    for offset in OFFSETS:
        expected = alone.receive(push_of(0, 1, offset), 0.0)
    pushes = data.draw(st.permutations(list(itertools.product(range(workers), OFFSETS))))
    answers = [answer for worker, offset in pushes for answer in shard.receive(push_of(worker, workers, offset), 0.0)]
    np.testing.assert_array_equal(shard.parameters, alone.parameters)
    totals = {answer.totals for answer in answers if answer.offset == 0}
    assert len(totals) == 1
    if clip_norm:
        assert totals == {answer.totals for answer in expected if answer.offset == 0}
    else:
        weights, state = np.linspace(-1, 1, COUNT, dtype=np.float32), adamw().init(COUNT, np.float32)
        adamw().update(weights, whole(LEAVES) / np.float32(SAMPLES), state, 1, RATE, DECAYED)
        np.testing.assert_array_equal(shard.parameters, weights)


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("worker 1 of 2, step 1, offset 0: 4 elements, the chunk has 8", {"gradient": np.zeros(4, np.float32)}),
        ("5 totals, which is not as many for each of 3 virtual shards", {"totals": (1.0,) * 5}),
        ("3 totals, but worker 0 of 2 sent 4", {"totals": (1.0,) * 3}),
        ("not finite at element 2", {"gradient": np.array([0, 0, 0, 0, 0, 0, np.nan, 0], np.float32)}),
    ],
)
def test_a_push_that_does_not_fit_the_tree_is_refused(words: str, changes: dict[str, object]) -> None:
    shard = new_shard(2)
    shard.receive(push_of(0, 2, 0), 0.0)
    with pytest.raises(Refused, match=words):
        shard.receive(push_of(1, 2, 0)._replace(**changes), 0.0)
    assert shard.receive(push_of(1, 2, 0), 0.0)
