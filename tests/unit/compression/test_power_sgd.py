"""PowerSGD's parts: what is a matrix of a slice, orthonormal columns, and how near the warm start comes to the SVD."""

import numpy as np
import pytest

from worker.compression.power_sgd import Factors, Matrix, first_factor, matrices_within, orthonormalize, product
from worker.engine.params import Parameter, lay_out


def slots_of(*shapes: tuple[int, ...]):
    return lay_out([(f"{index}.weight", Parameter("weight", shape, 1, 1)) for index, shape in enumerate(shapes)])


def test_matrices_are_the_whole_rows_within_a_slice() -> None:
    slots = slots_of((40, 30), (30,), (8, 4, 3, 3), (40, 2))
    assert matrices_within(slots, (0, 2000), 2) == [Matrix(0, 40, 30), Matrix(1230, 32, 9)]
    # Cut inside rows 2 and 20, and counted from the slice's start.
    assert matrices_within(slots, (65, 610), 2) == [Matrix(25, 17, 30)]
    assert matrices_within(slots, (65, 100), 2) == []  # one row is no matrix
    assert matrices_within(slots, (1200, 1230), 2) == []


def test_rows_become_orthonormal_and_dependent_ones_zero() -> None:
    factor = np.random.default_rng(0).standard_normal((4, 500)).astype(np.float32)
    factor[2] = 3 * factor[0] - factor[1]
    orthonormalize(factor)
    np.testing.assert_allclose(factor @ factor.T, np.diag([1, 1, 0, 1]), atol=1e-6)
    zeros = np.zeros((2, 5), np.float32)
    orthonormalize(zeros)
    assert not zeros.any()
    factor[1, 7] = np.nan
    orthonormalize(factor)
    assert np.isnan(factor[1]).all()


@pytest.mark.parametrize("columns", [1, 300, 70_000])
def test_the_product_is_that_of_matrices(columns: int) -> None:
    random = np.random.default_rng(1)
    left, right = random.standard_normal((3, 11)), random.standard_normal((3, columns))
    out = np.empty((11, columns), np.float32)
    product(left.astype(np.float32), right.astype(np.float32), out, np.empty(max(65536, columns), np.float32))
    np.testing.assert_allclose(out, left.T @ right, rtol=1e-4, atol=1e-5)


def test_with_a_warm_start_the_iteration_comes_to_the_truncated_svd() -> None:
    random = np.random.default_rng(2)
    gradient = (random.standard_normal((60, 5)) @ random.standard_normal((5, 50))).astype(np.float32)
    gradient += 0.3 * random.standard_normal(gradient.shape).astype(np.float32)
    rank = 3
    right = first_factor(Matrix(0, 60, 50), rank)
    for _ in range(30):
        left = right @ gradient.T
        orthonormalize(left)
        right = left @ gradient
    values = np.linalg.svd(gradient, compute_uv=False)
    best = float(np.sqrt((values[rank:] ** 2).sum()))
    assert best <= np.linalg.norm(gradient - left.T @ right) * (1 + 1e-5) <= best * 1.001


def test_what_two_nodes_sent_and_what_they_have_left_is_what_was_to_be_sent() -> None:
    slots, samples = slots_of((40, 30), (30,), (30, 20), (20,)), 5
    elements = slots[-1].stop
    random = np.random.default_rng(3)
    nodes = [Factors(slots, (0, elements), 2) for _ in range(2)]
    wanted, sent = np.zeros(elements), np.zeros(elements)
    for _ in range(6):
        totals = random.standard_normal((2, elements)).astype(np.float32)
        wanted += totals.sum(axis=0, dtype=np.float64) / samples
        for node, total in zip(nodes, totals, strict=True):
            node.begin(total, samples)
        nodes[0].first[:] = nodes[1].first[:] = nodes[0].first + nodes[1].first
        for node in nodes:
            node.turn()
        nodes[0].second[:] = nodes[1].second[:] = nodes[0].second + nodes[1].second
        for node, total in zip(nodes, totals, strict=True):
            node.end(total, samples)
        np.testing.assert_array_equal(*totals)
        sent += totals[0].astype(np.float64) / samples
    np.testing.assert_allclose(sent + nodes[0].residual + nodes[1].residual, wanted, atol=1e-5)
