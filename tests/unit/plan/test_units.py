"""Bandwidths and durations: what people write is read, and what lacks a unit is refused in one line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import UsageFault
from worker.plan.units import bandwidth_text, bytes_per_second, bytes_text, seconds, seconds_text


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("100Mbit", 12.5e6),
        ("1Gbit", 125e6),
        ("10Gbit/s", 1.25e9),
        ("12MB/s", 12e6),
        ("25Gbps", 25e9 / 8),
        ("1.5 Mb", 1.5e6 / 8),
        ("800bit/s", 100.0),
        (" 3 kB ", 3000.0),
    ],
)
def test_a_bandwidth_is_read_with_its_unit(text: str, rate: float) -> None:
    assert bytes_per_second(text) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("100", "'100' lacks its unit; say 100Mbit or 100MB/s"),
        ("10G", "'10G' lacks its unit; say 10Gbit or 10GB/s"),
        ("fast", "'fast' is no bandwidth"),
        ("-1Mbit", "'-1Mbit' is no bandwidth"),
        ("1e3Mbit", "is no bandwidth"),
        ("", "'' is no bandwidth"),
        ("0Gbit", "'0Gbit' carries nothing"),
    ],
)
def test_what_is_no_bandwidth_is_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(UsageFault) as refusal:
        bytes_per_second(text)
    assert said in str(refusal.value)
    assert str(refusal.value).startswith("--bandwidth: ")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "duration"), [("0.1ms", 1e-4), ("50us", 5e-5), ("0s", 0.0), ("2 s", 2.0), ("7ns", 7e-9)]
)
def test_a_duration_is_read_with_its_unit(text: str, duration: float) -> None:
    assert seconds(text) == pytest.approx(duration)


@pytest.mark.parametrize("text", ["1", "fast", "-1ms", "1 h"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(UsageFault, match="--latency: "):
        seconds(text)


@given(st.floats(min_value=1e3, max_value=1e12))
def test_what_a_table_shows_is_what_is_read(rate: float) -> None:
    assert bytes_per_second(bandwidth_text(rate)) == pytest.approx(rate, rel=1e-3)


def test_tables_show_three_digits() -> None:
    assert [seconds_text(value) for value in (0, 4.5e-6, 1.234e-3, 0.0123, 0.1234, 12.34)] == [
        *("0", "4.50 us", "1.23 ms", "12.3 ms", "123 ms", "12.3 s")
    ]
    assert [bytes_text(value) for value in (12, 1234, 12_340_000, 5e9)] == ["12 B", "1.23 kB", "12.3 MB", "5.00 GB"]
