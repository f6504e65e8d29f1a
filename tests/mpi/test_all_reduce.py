"""The all-reduce gives the same weights for any number of ranks and any way they lie on nodes."""

from pathlib import Path

import numpy as np
import pytest

PROGRAM = Path(__file__).with_name("programs") / "all_reduce.py"
STEPS = 10
PARAMETERS = 70_001  # more than two chunks, and not a multiple of anything


@pytest.mark.parametrize(
    ("optimizer", "clip_norm"),
    [
        *[(optimizer, 0) for optimizer in ("sgd", "momentum", "adagrad", "rmsprop", "adam", "adamw", "lamb")],
        *[(optimizer, 2.5) for optimizer in ("momentum", "lamb")],
    ],
)
def test_weights_and_state_are_the_same_however_the_ranks_lie_on_nodes(
    run_ranks, tmp_path, optimizer, clip_norm
) -> None:
    results = {}
    # (ranks, ranks a node): alone; shared memory; every rank a node; two nodes of two; unequal nodes of two and one.
    for ranks, ranks_per_node in [(1, 0), (2, 0), (2, 1), (4, 2), (3, 2), (5, 0)]:
        output = tmp_path / f"{ranks}-{ranks_per_node}.npz"
        done = run_ranks(ranks, [PROGRAM, output, ranks_per_node, optimizer, PARAMETERS, STEPS, clip_norm])
        assert done.returncode == 0, done.stderr
        results[ranks, ranks_per_node] = dict(np.load(output))
    reference = results.pop((1, 0))
    for world, result in results.items():
        assert result.keys() == reference.keys()
        for name, array in result.items():
            # RMSProp's first step is ten times the rate for any gradient: one that almost cancels out, and so is known
            # to few digits, counts as much as all others. LAMB's epsilon is a hundred times Adam's: such a gradient is
            # then near it, and its step hangs on the digits.
            atol = 3e-5 if optimizer in ("rmsprop", "lamb") else 1e-6
            np.testing.assert_allclose(array, reference[name], rtol=1e-5, atol=atol, err_msg=f"{name} on {world}")


def test_a_vector_shorter_than_the_ranks_works(run_ranks, tmp_path) -> None:
    output = tmp_path / "out.npz"
    done = run_ranks(3, [PROGRAM, output, 0, "sgd", 2, 3, 0])
    assert done.returncode == 0, done.stderr
    assert np.load(output)["parameters"].shape == (2,)
