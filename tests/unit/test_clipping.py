"""Clipping: what PyTorch gives, and the same in a parameter server however the vector is cut."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos import job_pb2
from protos.job_file import JobFileInvalid, parse_job
from worker.clipping import clip_by_value, norm_factor, sum_of_squares
from worker.optimizers import make_optimizer
from worker.server.pushes import Answer, Push, ShardSetup
from worker.server.shard import Shard

SGD = make_optimizer(job_pb2.Optimizer(sgd=job_pb2.SgdOptimizer(learning_rate=1)))
COUNT, CHUNK, WORKERS, SAMPLES = 10, 4, 3, 6
OFFSETS = (0, 4, 8)
JOB = """
data: {train: {built_in: digits}}
model: [dense: {units: 10}]
loss: softmax_cross_entropy
optimizer: sgd
training: %s
"""


def gradient(seed: int, size: float = 1.0) -> np.ndarray:
    return (size * np.random.default_rng(seed).standard_normal(COUNT)).astype(np.float32)


def test_a_gradient_within_the_norm_is_left_as_it_is() -> None:
    assert norm_factor(0.0, 1.0) == 1.0
    assert norm_factor(3.99, 2.0) == 1.0
    assert norm_factor(16.0, 2.0) == pytest.approx(0.5, rel=1e-6)
    assert norm_factor(np.inf, 2.0) == 0.0


def test_squares_of_large_gradients_do_not_overflow() -> None:
    assert sum_of_squares(np.full(3, 1e30, np.float32)) == pytest.approx(3e60, rel=1e-6)


def test_clipping_both_ways_is_refused() -> None:
    with pytest.raises(JobFileInvalid, match=r"training\.clip_value: 2 is given beside `clip_norm`; remove one"):
        parse_job(JOB % "{clip_norm: 1, clip_value: 2}")


@settings(max_examples=40, deadline=None)
@given(order=st.permutations(list(itertools.product(range(WORKERS), OFFSETS))), limit=st.sampled_from([0.1, 100.0]))
def test_a_shard_scales_all_chunks_by_the_norm_of_the_whole_gradient(order, limit) -> None:
    shard = Shard(
        ShardSetup(COUNT, "digest", WORKERS, chunk_elements=CHUNK, clip_norm=limit), SGD, gradient(9), {}
    )  # fmt: skip
    for worker in range(WORKERS):
        shard.join(worker, 1, COUNT, "digest")
    expected = gradient(9).astype(np.float64)
    for step in (1, 2):
        answers: list[Answer] = []
        for index, (worker, offset) in enumerate(order):
            part = gradient(10 * step + worker)[offset : offset + CHUNK]
            push = Push(worker, 1, step, offset, SAMPLES, 0.5, part, (1.0,) if offset == 0 else ())
            answers += shard.receive(push, 0.0)
            assert shard.receive(push, 0.0) == [] or index == len(order) - 1, "a repeated push waits like the first"
            assert bool(answers) == (index == len(order) - 1), "the norm is known when every chunk is there"
        assert sorted(answer.offset for answer in answers) == list(OFFSETS)
        assert all(answer.workers == tuple(range(WORKERS)) for answer in answers)
        assert [answer.totals for answer in answers if answer.offset == 0] == [(3.0,)]
        assert shard.version == (step, 0)
        mean = sum(gradient(10 * step + worker).astype(np.float64) for worker in range(WORKERS)) / SAMPLES
        expected -= 0.5 * mean * min(1.0, limit / (np.linalg.norm(mean) + 1e-6))
    np.testing.assert_allclose(shard.parameters, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.oracle
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_clipping_equals_torch_s(size: float) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make test-oracle installs and runs it")
    given_gradient = gradient(1, size)
    theirs = torch.nn.Parameter(torch.zeros(COUNT))
    theirs.grad = torch.tensor(given_gradient)
    torch.nn.utils.clip_grad_norm_([theirs], 0.7)
    ours = given_gradient * np.float32(norm_factor(sum_of_squares(given_gradient), 0.7))
    np.testing.assert_allclose(ours, theirs.grad.numpy(), rtol=1e-6)

    theirs.grad = torch.tensor(given_gradient)
    torch.nn.utils.clip_grad_value_([theirs], 0.7)
    weights = np.zeros(COUNT, np.float32)
    clip_by_value(SGD, 0.7).update(weights, given_gradient, {}, 1, 1.0, [])
    np.testing.assert_array_equal(-weights, theirs.grad.numpy())
