"""What a plan says a step takes is what it takes on two hosts with a slow link between, within a factor of two.

One way of each kind, on a link so slow that a step is mostly exchange; `python -m tests.mpi.plan_beside_runs` holds all
of them beside runs, on faster links too.
"""

import math
from pathlib import Path

import pytest

from tests.mpi.plan_beside_runs import Row, compare
from tests.mpi.shaped_link import slow_pair, why_not

FACTOR = 2.0
TRIES = 5  # others may keep this machine's cores busy: while it is measured, or while it trains
BANDWIDTH = "20Mbit"
CHOICES = {
    "all-reduce",
    "all-reduce, int8",
    "all-reduce, power_sgd",
    "parameter server, 2 shards",
    "parameter server, int8",
    "local steps of 4",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("hosts")
    reason = why_not(place)
    if reason is not None:
        pytest.skip(reason)
    return place


@pytest.mark.timeout(600)
def test_a_step_takes_what_was_said(folder: Path) -> None:
    nearest: dict[str, Row] = {}
    missed = CHOICES
    for _ in range(TRIES):
        with slow_pair(folder) as pair:
            for row in compare(pair, folder, ["784-128-10"], [BANDWIDTH], missed):
                nearest[row.choice] = min(nearest.get(row.choice, row), row, key=distance)
        missed = {choice for choice, row in nearest.items() if distance(row) > math.log(FACTOR)}
        if not missed:
            break
    assert set(nearest) == CHOICES
    assert not missed, [nearest[choice] for choice in sorted(missed)]


def distance(row: Row) -> float:
    """How far it is from what was said, to either side."""
    return abs(math.log(row.ratio))
