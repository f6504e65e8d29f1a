"""Measured figures: the line through them, and the file that carries them to another machine."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import UsageFault
from worker.plan.machine import Machine, fit_line, machine_from


@given(
    st.floats(0, 1),
    st.floats(1e-9, 1e-2),
    st.lists(st.integers(1, 10**6), min_size=2, max_size=6, unique=True),
)
def test_points_on_a_line_give_that_line(fixed: float, each: float, amounts: list[int]) -> None:
    line = fit_line(amounts, [fixed + each * amount for amount in amounts])
    for amount in amounts:
        assert line.at(amount) == pytest.approx(fixed + each * amount, rel=1e-5)


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(1e-7, 10)), min_size=1, max_size=5))
def test_no_part_of_a_line_is_below_0(points: list[tuple[int, float]]) -> None:
    line = fit_line([amount for amount, _ in points], [taken for _, taken in points])
    assert line.fixed >= 0
    assert line.each >= 0
    assert line.fixed + line.each > 0


def test_one_point_gives_the_line_through_0() -> None:
    assert fit_line([10], [0.5]) == (0.0, 0.05)


def test_figures_come_back_from_their_file(machine: Machine) -> None:
    assert machine_from(machine.to_json(), "m.json") == machine


def test_what_holds_no_figures_is_refused_in_one_line(machine: Machine) -> None:
    values = json.loads(machine.to_json())
    damaged = [
        "",
        "[]",
        "3",
        "{}",
        json.dumps(values | {"cores": "two"}),
        json.dumps(values | {"update_each": -1}),
        json.dumps(values | {"mpi": [1]}),
        json.dumps(values | {"mpi": [float("nan"), 1]}),
        json.dumps(values | {"ready": [3]}),
        json.dumps(values | {"more": 1}),
    ]
    for text in damaged:
        with pytest.raises(UsageFault) as refusal:
            machine_from(text, "m.json")
        assert str(refusal.value).startswith("m.json: holds")
        assert "\n" not in str(refusal.value)
