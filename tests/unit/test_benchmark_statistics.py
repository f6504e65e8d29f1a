"""What the benchmark makes of its rounds: medians, ratios, the order of runs, the tables."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.benchmarks.cases import CASES, Case, mlp
from tests.benchmarks.contenders import CONTENDERS, EAGER, OURS, Contender, Run
from tests.benchmarks.data_set import CONTEXT, make_images, make_text
from tests.benchmarks.machine import busy_warning
from tests.benchmarks.measurement import BenchmarkFailed, Measurement, PeerAbsent, read_measurement
from tests.benchmarks.rounds import run_rounds
from tests.benchmarks.spread import Spread, epochs_for, ratio_spread, spread
from tests.benchmarks.table import (
    footprint_table,
    format_markdown,
    format_spread,
    format_text,
    product_table,
    throughput_table,
)

RATES = st.lists(st.floats(1, 1e6), min_size=1, max_size=9)
CASE = mlp("tiny", (4, 3, 2), 2, 8)
STATED = {"samples_per_second": 100.0, "seconds_to_first_step": 0.5, "peak_memory_bytes": 8e7, "train_loss": 0.1}


def never(run: Run) -> Measurement:
    raise AssertionError("the tests measure nothing")


ROWS = (
    Contender("ours", OURS, 1, never),
    Contender("first peer", EAGER, 1, never),
    Contender("second peer", "B", 1, never),
    Contender("ours on two", OURS, 2, never),
    Contender("first peer on two", EAGER, 2, never),
)


def measured(samples_per_second: float, seconds: float = 1.0, megabytes: float = 100.0) -> Measurement:
    return Measurement(samples_per_second, seconds, megabytes * 1e6, 0.1, "")


RESULTS = {
    ("tiny", "ours"): [measured(100, 0.5, 80), measured(200, 0.6, 80), measured(300, 0.4, 80)],
    ("tiny", "first peer"): [measured(100, 2, 400), measured(100, 2, 400), measured(100, 2, 400)],
    ("tiny", "second peer"): [measured(50, 1, 800), measured(400, 1, 800), measured(200, 1, 800)],
    ("tiny", "ours on two"): [measured(200), measured(300), measured(600)],
    ("tiny", "first peer on two"): [measured(100), measured(150), measured(200)],
}


@given(RATES)
def test_a_spread_is_the_middle_and_the_ends_whatever_the_order(values: list[float]) -> None:
    assert spread(values) == spread(reversed(values))
    assert spread(values).low == sorted(values)[0]
    assert spread(values).high == sorted(values)[-1]
    assert spread(values).low <= spread(values).median <= spread(values).high


def test_the_median_of_an_even_number_is_the_mean_of_the_middle_two() -> None:
    assert spread([4, 1, 3, 2]) == Spread(2.5, 1, 4)


def test_a_spread_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        spread([])


@given(RATES)
def test_a_ratio_taken_within_rounds_is_untouched_by_drift_that_hits_both(drift: list[float]) -> None:
    ours, theirs = [3 * value for value in drift], [2 * value for value in drift]
    assert ratio_spread(ours, theirs) == pytest.approx((1.5, 1.5, 1.5))


def test_ratios_need_both_sides_of_every_round() -> None:
    with pytest.raises(ValueError, match="zip"):
        ratio_spread([1, 2], [1])


@pytest.mark.parametrize(
    ("seconds", "rate", "samples", "epochs"), [(3, 1000, 1000, 4), (3, 100, 1000, 2), (3, 1e5, 16_384, 19)]
)
def test_epochs_fill_the_seconds_after_the_untimed_first(
    seconds: float, rate: float, samples: int, epochs: int
) -> None:
    assert epochs_for(seconds, rate, samples) == epochs


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_step_of_a_timed_network_is_ragged(case: Case) -> None:
    for ranks in {contender.ranks for contender in CONTENDERS}:
        assert case.samples % (ranks * case.batch_size) == 0
        assert case.shortened().samples % (ranks * case.batch_size) == 0


def test_the_images_are_the_same_every_time() -> None:
    images, labels = make_images(64)
    again, labels_again = make_images(64)
    assert images.dtype == "uint8"
    assert images.shape == (64, 28, 28)
    assert labels.dtype == "int64"
    assert set(labels) <= set(range(10))
    assert (images == again).all()
    assert (labels == labels_again).all()


def test_the_text_is_the_same_every_time_and_of_the_length_asked_for() -> None:
    text = make_text(10 * CONTEXT + 1)
    assert len(text) == 10 * CONTEXT + 1
    assert text == make_text(len(text))
    assert set(text) <= set(b"abcdefghijklmnopqrstuvwxyz ")


def test_what_a_case_puts_out_is_what_chance_is_reckoned_by() -> None:
    assert {case.name: case.classes for case in CASES} == {
        **dict.fromkeys(("small", "medium", "large", "cnn"), 10),
        "transformer": 256,
    }


@pytest.mark.parametrize("field", STATED)
@pytest.mark.parametrize("value", [None, -1.0, math.nan, "fast"])
def test_a_run_that_does_not_state_a_figure_is_refused(field: str, value: object) -> None:
    with pytest.raises(BenchmarkFailed, match=field):
        read_measurement(STATED | {field: value}, classes=10)


@pytest.mark.parametrize("field", sorted(STATED.keys() - {"train_loss"}))
def test_only_the_loss_of_a_run_can_be_zero(field: str) -> None:
    assert read_measurement(STATED | {"train_loss": 0.0}, classes=10).train_loss == 0
    with pytest.raises(BenchmarkFailed, match=field):
        read_measurement(STATED | {field: 0}, classes=10)


def test_a_run_that_did_not_learn_is_refused() -> None:
    assert read_measurement(STATED | {"version": "9"}, classes=10) == Measurement(100.0, 0.5, 8e7, 0.1, "9")
    with pytest.raises(BenchmarkFailed, match="did not learn"):
        read_measurement(STATED | {"train_loss": math.log(10)}, classes=10)


def test_a_peer_of_more_threads_than_one_is_refused() -> None:
    assert read_measurement(STATED | {"busy_cores": 1.01}, classes=10).samples_per_second == 100
    with pytest.raises(BenchmarkFailed, match=r"kept 1\.40 cores busy"):
        read_measurement(STATED | {"busy_cores": 1.4}, classes=10)


def test_rounds_take_turns_and_the_warm_up_is_thrown_away() -> None:
    runs: list[tuple[str, int]] = []
    lines: list[str] = []

    def measure(case: Case, contender: Contender, epochs: int) -> Measurement:
        runs.append((contender.name, epochs))
        return measured(40.0 if contender.name == "ours" else 8.0)

    results, absent = run_rounds([CASE], ROWS[:2], 2, 1.0, measure, lines.append)
    assert not absent
    warm_up, timed = [("ours", 2), ("first peer", 2)], [("ours", 6), ("first peer", 2)]
    assert runs == warm_up[::-1] + timed + timed[::-1]
    assert {key: len(values) for key, values in results.items()} == {("tiny", "ours"): 2, ("tiny", "first peer"): 2}
    assert len(lines) == len(runs)


def test_without_seconds_there_is_no_warm_up() -> None:
    results, _ = run_rounds([CASE], ROWS[:1], 1, None, lambda *_: measured(1.0), lambda _: None)
    assert results == {("tiny", "ours"): [measured(1.0)]}


def test_a_failed_run_names_the_contender_and_the_network() -> None:
    def measure(case: Case, contender: Contender, epochs: int) -> Measurement:
        raise BenchmarkFailed("exited with 1")

    with pytest.raises(BenchmarkFailed, match="first peer on 4-3-2, batch 2 a rank: exited with 1"):
        run_rounds([CASE], ROWS[1:2], 1, None, measure, lambda _: None)


def test_who_cannot_run_here_is_asked_once_and_shown_as_absent() -> None:
    asked: list[str] = []

    def measure(case: Case, contender: Contender, epochs: int) -> Measurement:
        asked.append(contender.name)
        if contender.name == "second peer":
            raise PeerAbsent("no compiler")
        return measured(10.0)

    results, absent = run_rounds([CASE], ROWS[:3], 2, None, measure, lambda _: None)
    assert absent == {"second peer": "no compiler"}
    assert asked.count("second peer") == 1
    rows = {row[2]: row[3:] for row in throughput_table(results, [CASE], ROWS[:3]).rows}
    assert rows["second peer"] == ("absent", "", "", "")
    assert rows["ours"] == ("10", "1.00", "1.00", "")
    footprint = {row[2]: row[3:] for row in footprint_table(results, [CASE], ROWS[:3]).rows}
    assert footprint["second peer"] == ("absent", "", "absent", "")


def test_nobody_runs_a_kind_of_network_that_is_not_his() -> None:
    results, _ = run_rounds(
        [CASE], [ROWS[0], ROWS[1]._replace(kinds=("cnn",))], 1, None, lambda *_: measured(1.0), lambda _: None
    )
    assert list(results) == [("tiny", "ours")]


def test_a_step_is_set_against_its_products_round_by_round() -> None:
    alone = Contender("products", OURS, 1, never)
    results = {
        ("tiny", "ours"): [measured(100), measured(200)],
        ("tiny", "products"): [Measurement(200, flop=1e6), Measurement(250, flop=1e6)],
    }
    ((*_, step, seconds, speed, share, ratio),) = product_table(results, [CASE], ROWS[0], alone).rows
    assert step == "15.00 [10.00 .. 20.00]"
    assert seconds == "9.00 [8.00 .. 10.00]"
    assert speed == "0.1"
    assert share == "0.65 [0.50 .. 0.80]"
    assert ratio == "1.62 [1.25 .. 2.00]"


def test_throughput_is_set_against_the_peer_of_the_best_median_and_against_one_rank() -> None:
    rows = {row[2]: row[3:] for row in throughput_table(RESULTS, [CASE], ROWS).rows}
    assert rows["ours"] == ("200 [100 .. 300]", "1.50 [0.50 .. 2.00]", "2.00 [1.00 .. 3.00]", "")
    assert rows["second peer"] == ("200 [50 .. 400]", "", "", "")
    assert rows["ours on two"] == (
        "300 [200 .. 600]",
        "2.00 [2.00 .. 3.00]",
        "2.00 [2.00 .. 3.00]",
        "2.00 [1.50 .. 2.00]",
    )
    assert rows["first peer on two"] == ("150 [100 .. 200]", "", "", "1.50 [1.00 .. 2.00]")


def test_of_seconds_and_memory_the_best_peer_has_least() -> None:
    rows = {row[2]: row[3:] for row in footprint_table(RESULTS, [CASE], ROWS).rows}
    assert rows["ours"] == ("0.50 [0.40 .. 0.60]", "0.50 [0.40 .. 0.60]", "80", "0.20")
    assert rows["first peer"] == ("2.00", "", "400", "")


def test_figures_are_grouped_and_a_range_of_one_value_is_left_out() -> None:
    assert format_spread(Spread(104_512.3, 99_000, 110_000.9), 0) == "104,512 [99,000 .. 110,001]"
    assert format_spread(Spread(2.0, 2.0, 2.0), 1) == "2.0"


def test_both_forms_of_a_table_hold_the_same_cells() -> None:
    table = throughput_table(RESULTS, [CASE], ROWS)
    text, markdown = format_text(table), format_markdown(table)
    assert markdown.splitlines()[1] == "| --- | ---: | --- | ---: | ---: | ---: | ---: |"
    assert len(markdown.splitlines()) == 2 + len(ROWS)
    for row in table.rows:
        assert f"| {' | '.join(row)} |" in markdown
        assert all(cell in text for cell in row)
    assert text.count(CASE.title) == 1


def test_a_busy_machine_is_said_to_be_busy() -> None:
    assert busy_warning(0.1) is None
    assert "3.2" in str(busy_warning(3.2))
