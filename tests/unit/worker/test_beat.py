"""Who is late by the numbers ranks leave, with invented clocks."""

import numpy as np
import pytest

from worker.beat import FIELDS, PHASES, Beat, Seen, late, read

NOW = 100.0


def seen(rank: int, step: int, phase: str, alive: float = NOW) -> Seen:
    return Seen(rank, 1000 + rank, step, 2, phase, NOW - 5, alive, left=False, spoken=False)


@pytest.mark.parametrize("phase", PHASES)
def test_others_read_what_a_rank_has_marked(phase) -> None:
    beat = Beat(3, 4711)
    beat.step(12, 2)
    segment = np.zeros(FIELDS)
    beat.move(segment)
    beat.phase(phase)
    found = read(segment)
    assert (found.rank, found.process, found.step, found.epoch, found.phase) == (3, 4711, 12, 2, phase)
    assert not found.left
    beat.leave()
    assert read(segment).left
    assert not read(segment).spoken
    beat.leave(spoken=True)
    beat.leave()
    assert read(segment).spoken


def test_a_place_is_said_in_the_words_of_the_job() -> None:
    assert seen(1, 12, "forward").place() == "step 12 (epoch 2), phase forward"
    assert seen(1, 12, "publish").place() == "step 12 (epoch 2), phase exchange"
    assert seen(1, 0, "starting").place() == "the start, before the first step"


@pytest.mark.parametrize("phase", ["data", "forward", "backward"])
def test_who_still_computes_holds_up_those_that_exchange(phase) -> None:
    ranks = [seen(0, 7, "exchange"), seen(1, 7, phase), seen(2, 7, "exchange")]
    assert late(ranks, NOW, 1.0) == [ranks[1]]
    assert late(ranks, NOW, 1.0, has_peers=True) == [ranks[1]]


def test_who_is_a_step_behind_is_late() -> None:
    ranks = [seen(0, 8, "data"), seen(1, 7, "update")]
    assert late(ranks, NOW, 1.0) == [ranks[1]]


def test_a_silent_rank_is_late_wherever_it_is() -> None:
    ranks = [seen(0, 7, "exchange"), seen(1, 7, "exchange", alive=NOW - 3), seen(2, 7, "forward")]
    assert late(ranks, NOW, 1.0) == [ranks[1]]


def test_where_all_are_equally_far_nobody_here_is_late() -> None:
    assert late([seen(0, 7, "exchange"), seen(1, 7, "exchange")], NOW, 1.0) == []


def test_waiting_for_peers_on_other_machines_is_not_being_late() -> None:
    ranks = [seen(0, 7, "exchange"), seen(1, 7, "publish")]
    assert late(ranks, NOW, 1.0) == [ranks[0]]
    assert late(ranks, NOW, 1.0, has_peers=True) == []
