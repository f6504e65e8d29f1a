"""Whom a rank that waits says that it waits for."""

import pytest

from worker.sync.progress import PHASES, Whereabouts, who_is_late


def rank(number: int, step: int, phase: str, state: str = "S") -> Whereabouts:
    return Whereabouts(number, step, phase, 2.5, 100 + number, state)


def test_the_phases_are_in_the_order_of_a_step() -> None:
    assert PHASES.index("the data") < PHASES.index("forward") < PHASES.index("backward") < PHASES.index("the exchange")


@pytest.mark.parametrize(
    ("places", "elsewhere", "sentence"),
    [
        (
            [rank(0, 17, "the exchange"), rank(1, 17, "forward")],
            "",
            "rank 1 (process 101), in forward of step 17 for 2.5 s, is late (here)",
        ),
        (
            [rank(0, 18, "the data"), rank(1, 17, "the exchange")],
            "there",
            "rank 1 (process 101), in the exchange of step 17 for 2.5 s, is late (here)",
        ),
        (
            [rank(0, 17, "forward"), rank(1, 17, "the exchange", "T")],
            "",
            "rank 1 (process 101), in the exchange of step 17 for 2.5 s, is stopped (here)",
        ),
        (
            [rank(0, 17, "the exchange"), rank(1, 17, "the update", ""), rank(2, 17, "forward", "T")],
            "",
            "rank 1 (process 101), in the update of step 17 for 2.5 s, is gone (here)",
        ),
        (
            [rank(0, 17, "the exchange"), rank(1, 17, "the exchange")],
            "there",
            "every rank of here is in the exchange of step 17 and waits for one of there",
        ),
        ([rank(0, 17, "the exchange"), rank(1, 17, "the exchange")], "", "every rank is in the exchange of step 17"),
        ([rank(0, 0, "the start")], "", "this rank is in the start"),
    ],
)
def test_the_rank_that_is_waited_for_is_named(places, elsewhere, sentence) -> None:
    assert who_is_late(places, "here", elsewhere) == sentence
