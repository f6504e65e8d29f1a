"""The all-reduce gives the same weights for any number of ranks and any way they lie on nodes."""

from pathlib import Path

import numpy as np

PROGRAM = Path(__file__).with_name("programs") / "all_reduce.py"
STEPS = 10
PARAMETERS = 70_001  # more than two chunks, and not a multiple of anything


OPTIMIZERS = ("sgd", "momentum", "adagrad", "rmsprop", "adam", "adamw", "lamb", "momentum:2.5", "lamb:2.5")  # norm
# (ranks, ranks a node): shared memory; every rank a node; two nodes of two; unequal nodes of two and one; all on one.
WORLDS = [(2, 0), (2, 1), (4, 2), (3, 2), (5, 0)]


def test_weights_and_state_are_the_same_however_the_ranks_lie_on_nodes(run_ranks, tmp_path) -> None:
    reference = run_all(run_ranks, tmp_path, 1, 0)
    for world in WORLDS:
        results = run_all(run_ranks, tmp_path, *world)
        for optimizer in OPTIMIZERS:
            result, alone = results[optimizer], reference[optimizer]
            assert result.keys() == alone.keys()
            # RMSProp's first step is ten times the rate for any gradient: one that almost cancels out, and so is known
            # to few digits, counts as much as all others. LAMB's epsilon is a hundred times Adam's: such a gradient is
            # then near it, and its step hangs on the digits.
            atol = 3e-5 if optimizer.startswith(("rmsprop", "lamb")) else 1e-6
            for name, array in result.items():
                said = f"{optimizer}: {name} on {world}"
                np.testing.assert_allclose(array, alone[name], rtol=1e-5, atol=atol, err_msg=said)


def test_a_vector_shorter_than_the_ranks_works(run_ranks, tmp_path) -> None:
    done = run_ranks(3, [PROGRAM, tmp_path, 0, 2, 3, "sgd"])
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "sgd.npz")["parameters"].shape == (2,)


def run_all(run_ranks, folder: Path, ranks: int, ranks_per_node: int) -> dict[str, dict[str, np.ndarray]]:
    """What each optimizer leaves."""
    output = folder / f"{ranks}-{ranks_per_node}"
    output.mkdir()
    done = run_ranks(ranks, [PROGRAM, output, ranks_per_node, PARAMETERS, STEPS, *OPTIMIZERS])
    assert done.returncode == 0, done.stderr
    return {optimizer: dict(np.load(output / f"{optimizer}.npz")) for optimizer in OPTIMIZERS}
