"""The clock that jobs are measured by."""

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from coordinator.clock import steady_clock

NOON = datetime(2026, 5, 4, 12, tzinfo=UTC)


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(-(10**9), 10**9)), max_size=20))
def test_it_counts_seconds_from_the_wall_clocks_time_however_that_is_set(steps: list[tuple[int, int]]) -> None:
    wall, seconds = NOON, 1000.0
    clock = steady_clock(lambda: wall, lambda: seconds)
    passed = 0
    for went, jumped in steps:
        seconds, passed = seconds + went, passed + went
        wall += timedelta(seconds=went + jumped)
        assert clock() == NOON + timedelta(seconds=passed)
