"""What a plan advises: what changes less, unless what changes more is worth it; and one node where none is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.plan.choices import Choice, WireFormat
from worker.plan.prediction import Prediction
from worker.plan.recommendation import TOLERANCE, recommend

INT8 = WireFormat("int8", 1.0, 0.0, 0.0, sums_well=True)
PLAIN, SERVER = Choice("all_reduce"), Choice("parameter_server")
CODED, LOCAL = Choice("all_reduce", INT8), Choice("local", steps=8)
ALONE = Prediction(PLAIN, 10.0, 0.0, 0.0, 0.0, 0.0)


def step(choice: Choice, exchange_seconds: float, compute_seconds: float = 1.0) -> Prediction:
    return Prediction(choice, compute_seconds, exchange_seconds, 0.0, 0.0, 0.0)


def test_a_small_exchange_is_left_as_it_is() -> None:
    advice = recommend([step(PLAIN, 0.05), step(CODED, 0.01), step(LOCAL, 0.0)], ALONE, 2)
    assert advice.best.choice == PLAIN
    assert advice.sentence == "all-reduce: the exchange is 5% of the step, and nothing shortens it by a tenth"


def test_local_steps_are_only_mentioned_beside_an_exchange_that_is_less_than_half() -> None:
    advice = recommend([step(PLAIN, 0.8), step(LOCAL, 0.0)], ALONE, 2)
    assert advice.best.choice == PLAIN
    assert advice.sentence.endswith(
        "nothing that keeps the result shortens it by a tenth (local steps of 8 would bring 1.8x but change the result)"
    )


def test_compression_is_taken_where_it_pays_and_local_steps_are_mentioned() -> None:
    advice = recommend([step(PLAIN, 4.0), step(SERVER, 8.0), step(CODED, 0.6), step(LOCAL, 0.1)], ALONE, 2)
    assert advice.best.choice == CODED
    assert advice.sentence == (
        "all-reduce, int8: the exchange is 80% of the all-reduce's step, this brings 3.1x but sends part of each "
        "gradient later: validate it (local steps of 8 would bring 4.5x but change the result)"
    )


def test_local_steps_are_taken_where_compression_leaves_mostly_exchange() -> None:
    advice = recommend([step(PLAIN, 8.0), step(CODED, 3.0), step(LOCAL, 0.5)], ALONE, 2)
    assert advice.best.choice == LOCAL
    assert "but changes the result" in advice.sentence


def test_the_server_is_taken_where_it_is_faster_by_more_than_a_tenth() -> None:
    assert recommend([step(PLAIN, 1.0), step(SERVER, 0.9)], ALONE, 2).best.choice == PLAIN
    assert recommend([step(PLAIN, 1.0), step(SERVER, 0.5)], ALONE, 2).best.choice == SERVER


def test_one_node_is_advised_where_more_are_slower() -> None:
    advice = recommend([step(PLAIN, 19.0)], ALONE, 4)
    assert advice.best is ALONE
    assert advice.sentence.startswith("one node: 4 nodes take 2.0x its time a step even with all-reduce")


def test_one_node_is_advised_where_what_changes_the_result_wins_by_less_than_a_tenth_over_it() -> None:
    advice = recommend([step(PLAIN, 19.0), step(LOCAL, 0.5, 9.3)], ALONE, 2)
    assert advice.best is ALONE
    assert "would bring" not in advice.sentence
    advice = recommend([step(PLAIN, 19.0), step(CODED, 0.5, 9.3)], ALONE, 2)
    assert advice.sentence.startswith("one node: all-reduce, int8 on 2 nodes is not faster by a tenth")


def test_beside_one_node_local_steps_are_mentioned_where_they_would_be_faster() -> None:
    advice = recommend([step(PLAIN, 19.0), step(CODED, 10.0), step(LOCAL, 0.25, 6.0)], ALONE, 4)
    assert advice.sentence == (
        "one node: 4 nodes take 1.1x its time a step even with all-reduce, int8 (local steps of 8 would bring 1.6x but "
        "change the result); a larger batch_size gives each exchange more to compute"
    )


def test_on_one_node_there_is_nothing_to_leave() -> None:
    assert recommend([step(PLAIN, 0.0, 10.0)], ALONE, 1).best.choice == PLAIN


offered = st.lists(
    st.tuples(st.sampled_from([SERVER, CODED, LOCAL]), st.floats(0, 100), st.floats(1e-3, 10)), max_size=6
)


@given(st.floats(0, 100), offered, st.integers(1, 8))
def test_what_changes_the_result_is_advised_only_where_it_wins_by_a_tenth(exchange, others, nodes) -> None:
    predictions = [step(PLAIN, exchange), *(step(*other) for other in others)]
    advice = recommend(predictions, ALONE, nodes)
    assert "\n" not in advice.sentence
    if advice.best is ALONE:
        assert nodes > 1
        return
    for milder in predictions:
        if milder.choice.change < advice.best.choice.change:
            assert milder.step_seconds > TOLERANCE * advice.best.step_seconds * (1 - 1e-12)


@pytest.mark.parametrize(
    ("choice", "name"),
    [
        (PLAIN, "all-reduce"),
        (Choice("parameter_server", INT8, servers=2), "parameter server, 2 shards, int8"),
        (LOCAL, "local steps of 8"),
    ],
)
def test_choices_are_named_as_people_name_them(choice: Choice, name: str) -> None:
    assert choice.name == name
