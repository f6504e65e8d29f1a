"""Gradients that travel between nodes while backward runs lead to the weights that one rank alone comes to.

Shared memory here is that of one machine; several nodes are pretended on it, which leaves every rank's own part as it
is on several machines.
"""

from pathlib import Path

import numpy as np
import pytest

PROGRAM = Path(__file__).with_name("programs") / "buckets.py"
CASES = ("momentum", "pieces", "clipped", "images", "tokens")
TOLERANCE = 1e-5  # of the largest weight


@pytest.fixture(scope="module")
def run_worlds(tmp_path_factory: pytest.TempPathFactory):
    """run_worlds(run_ranks, ranks, *ranks a node): the weights, trained once for each."""
    done: dict[tuple[int, ...], dict[str, np.ndarray]] = {}

    def run(run_ranks, ranks: int, *ranks_per_node: int) -> dict[str, np.ndarray]:
        if (ranks, *ranks_per_node) not in done:
            output = tmp_path_factory.mktemp("buckets") / "out.npz"
            ended = run_ranks(ranks, [PROGRAM, output, *ranks_per_node])
            assert ended.returncode == 0, ended.stderr
            done[ranks, *ranks_per_node] = dict(np.load(output))
        return done[ranks, *ranks_per_node]

    return run


# Two nodes; three, and unequal ones of two and one; four, two of two, unequal ones of three and one; six: two unequal
# nodes of four and two, where two ranks own no slice, and three of two.
@pytest.mark.parametrize(
    ("ranks", "kinds"), [(2, (1,)), (3, (1, 2)), (4, (1, 2, 3)), (6, (4, 2))], ids=["2", "3", "4", "6"]
)
def test_weights_are_those_of_one_rank_with_overlap_and_without(run_ranks, run_worlds, ranks, kinds) -> None:
    reference = run_worlds(run_ranks, 1, 0)
    results = run_worlds(run_ranks, ranks, *kinds)
    for case in CASES:
        expected = reference[f"{case}/0/True"]
        for kind in kinds:
            overlapped, plain = results[f"{case}/{kind}/True"], results[f"{case}/{kind}/False"]
            atol = TOLERANCE * np.abs(expected).max()
            np.testing.assert_allclose(overlapped, expected, rtol=0, atol=atol, err_msg=f"{case} on {ranks}/{kind}")
            np.testing.assert_array_equal(overlapped, plain, err_msg=f"{case} on {ranks}/{kind}")


def test_buckets_set_out_while_backward_runs(run_ranks, run_worlds) -> None:
    results = run_worlds(run_ranks, 2, 1)
    for case in CASES:
        # Nobody else need have finished: each bucket sets out as soon as this rank has passed it.
        assert results[f"{case}/1/True/early"] >= 3, case
        assert results[f"{case}/1/False/early"] == 0
    assert not any(value for key, value in run_worlds(run_ranks, 1, 0).items() if key.endswith("/early"))
