"""Local steps on pretended nodes: equal to the same thing written down plainly, and to the all-reduce."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.mpi import local_reference
from tests.mpi.local_reference import COUNT

PROGRAM = Path(__file__).with_name("programs") / "local_steps.py"
# Ragged: the last batch leaves some ranks, and with two nodes of two the first node, without a sample.
BATCHES = [12, 12, 12, 12, 12, 12, 1]
NESTEROV = {"nesterov": {"learning_rate": 0.6, "momentum": 0.8}}


def replicas(ranks: int, ranks_per_node: int) -> list[list[int]]:
    return [list(range(ranks))[first : first + ranks_per_node] for first in range(0, ranks, ranks_per_node)]


def run_all(run_ranks, tmp_path, ranks: int, ranks_per_node: int, runs: list[dict]) -> list[dict[str, np.ndarray]]:
    output = tmp_path / "out.npz"
    done = run_ranks(ranks, [PROGRAM, output, ranks_per_node, json.dumps(runs)])
    assert done.returncode == 0, done.stderr
    results: list[dict[str, np.ndarray]] = [{} for _ in runs]
    for name, array in np.load(output).items():
        number, _, name = name.partition(".")
        results[int(number)][name] = array
    return results


def run(run_ranks, tmp_path, ranks: int, ranks_per_node: int, settings: dict) -> dict[str, np.ndarray]:
    return run_all(run_ranks, tmp_path, ranks, ranks_per_node, [settings])[0]


@pytest.mark.parametrize("outer", [{"average": {}}, {"sgd": {"learning_rate": 0.5}}, NESTEROV])
@pytest.mark.parametrize(("ranks", "ranks_per_node"), [(2, 1), (4, 2), (3, 2), (3, 1)])
def test_equal_to_a_plain_reference_on_equal_and_unequal_nodes(run_ranks, tmp_path, outer, ranks, ranks_per_node):
    settings = {"outer": outer, "steps": 4, "epochs": 2, "batches": BATCHES}
    result = run(run_ranks, tmp_path, ranks, ranks_per_node, settings)
    reference = local_reference.train(replicas(ranks, ranks_per_node), settings)
    np.testing.assert_allclose(result["parameters"], reference, rtol=0, atol=1e-6)
    assert result["counted"].tolist() == [48, 25, 48, 25], "two meetings an epoch, the second forced by its end"
    # Running statistics, here the number of the rank: the mean over the replicas by their samples.
    nodes = replicas(ranks, ranks_per_node)
    assert result["means"][0] == pytest.approx(sum(len(node) * node[0] for node in nodes) / ranks, rel=1e-6)


@pytest.mark.parametrize("short", [False, True])
def test_inner_momentum_stays_local_until_an_epoch_ends_with_and_without_shared_memory(run_ranks, tmp_path, short):
    settings = {"outer": NESTEROV, "steps": 3, "epochs": 3, "batches": BATCHES, "short": short}
    settings["optimizer"] = {"momentum": {"momentum": 0.7}}
    result = run(run_ranks, tmp_path, 3, 2, settings)
    reference = local_reference.train(replicas(3, 2), settings, momentum=0.7)
    np.testing.assert_allclose(result["parameters"], reference, rtol=0, atol=3e-6)
    assert ("shared memory is not used" in str(result["note"])) == short
    assert result["outer.velocity"].shape == result["velocity"].shape == (COUNT,)


@pytest.mark.parametrize(("ranks", "ranks_per_node"), [(2, 1), (4, 2), (3, 2)])
def test_meeting_in_every_step_to_average_is_the_all_reduce(run_ranks, tmp_path, ranks, ranks_per_node) -> None:
    """Plain descent from common weights, weighted by samples, is one step on the mean of all, ragged or not."""
    settings = {"outer": {"average": {}}, "steps": 1, "epochs": 2, "batches": BATCHES}
    result = run(run_ranks, tmp_path, ranks, ranks_per_node, settings)
    weights = local_reference.start().astype(np.float64)
    for step, samples in enumerate(BATCHES * 2, start=1):
        weights -= local_reference.RATE * local_reference.gradient(weights, step, range(samples)) / samples
    np.testing.assert_allclose(result["parameters"], weights, rtol=0, atol=1e-6)


def test_what_travels_falls_with_the_steps_between_meetings(run_ranks, tmp_path) -> None:
    runs = [{"outer": NESTEROV, "steps": steps, "epochs": 1, "batches": [4] * 24} for steps in (1, 4, 12)]
    results = run_all(run_ranks, tmp_path, 2, 1, runs)
    assert [int(result["sent"]) for result in results] == [meetings * 4 * COUNT for meetings in (24, 6, 2)]


@pytest.mark.parametrize(("ranks", "ranks_per_node"), [(5, 2), (4, 3)])
def test_whatever_the_batches_and_the_steps_it_is_what_the_reference_does(run_ranks, tmp_path, ranks, ranks_per_node):
    random = np.random.default_rng(ranks)
    runs, momenta = [], []
    for _ in range(12):
        momenta.append(float(random.choice([0, 0.5, 0.9])))
        rate = float(random.uniform(0.3, 1.2))
        outers = [{"average": {}}, {"sgd": {"learning_rate": rate}}, {"nesterov": {"learning_rate": rate}}]
        runs.append(
            {
                "outer": outers[random.integers(3)],
                "steps": int(random.integers(1, 6)),
                "epochs": 2,
                "batches": random.integers(1, 3 * ranks, random.integers(1, 10)).tolist(),
                "optimizer": {"momentum": {"momentum": momenta[-1]}},
                "short": bool(random.integers(2)),
            }
        )
    results = run_all(run_ranks, tmp_path, ranks, ranks_per_node, runs)
    for settings, momentum, result in zip(runs, momenta, results, strict=True):
        reference = local_reference.train(replicas(ranks, ranks_per_node), settings, momentum)
        np.testing.assert_allclose(result["parameters"], reference, rtol=0, atol=5e-6, err_msg=str(settings))
        assert sum(result["counted"]) == 2 * sum(settings["batches"])
