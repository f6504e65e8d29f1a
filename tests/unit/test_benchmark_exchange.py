"""The table of the exchange alone, of invented rounds."""

from tests.benchmarks.exchange_alone import ECHO, GLOO, OURS, SIZES, exchange_table


def rounds(*milliseconds: float) -> list[dict[str, float]]:
    return [dict.fromkeys(SIZES, value / 1e3) for value in milliseconds]


def test_every_size_has_a_row_for_each_side_and_ratios_are_taken_within_rounds() -> None:
    table = exchange_table({OURS: rounds(1, 2, 4), GLOO: rounds(10, 20, 40), ECHO: rounds(3, 4, 8)})
    assert [row[0] for row in table.rows] == [size for size in SIZES for _ in range(3)]
    ours, gloo, echo = table.rows[:3]
    assert ours[2:] == (OURS, "2.000 [1.000 .. 4.000]", "")
    assert gloo[2:] == (GLOO, "20.000 [10.000 .. 40.000]", "10.0")
    assert echo[2:] == (ECHO, "4.000 [3.000 .. 8.000]", "2.0 [2.0 .. 3.0]")
