"""The table of the parameter servers, of invented rounds; one case for real; the parts of the command."""

from pathlib import Path

import pytest

from tests.benchmarks import parameter_servers
from tests.benchmarks.__main__ import PARTS, in_order, make_parser, measure_parts
from tests.benchmarks.measurement import BenchmarkFailed
from tests.benchmarks.parameter_servers import CASES, ECHOES, SHARD, SIZES, Case, Side, measure, server_table
from tests.benchmarks.section import Section, Setting
from tests.benchmarks.table import format_text

TINY = Case("tiny", 2, 2)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "tiny", 1000)


def test_the_cases_are_every_number_of_servers_and_workers() -> None:
    assert {(case.servers, case.workers) for case in CASES} == {(s, w) for s in (1, 2, 4) for w in (1, 2, 3, 4)}


def test_a_row_is_beside_the_faster_echo_with_ratios_taken_within_rounds() -> None:
    slow, fast = ECHOES
    measured = {CASES[0]: {SHARD: [0.002, 0.004, 0.003], slow: [0.9, 0.9, 0.9], fast: [0.001, 0.004, 0.002]}}
    (row,) = server_table(measured).rows
    assert row[3:] == ("3.00 [2.00 .. 4.00]", "2.00 [1.00 .. 4.00]", "1.50 [1.00 .. 2.00]")


def test_both_sides_make_their_trips_through_several_servers(tiny: None, tmp_path: Path) -> None:
    found = measure(TINY, 2, 0.0, tmp_path)
    assert set(found) == {SHARD, *ECHOES}
    assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in found.values())


def test_a_process_that_ends_fails_the_benchmark_and_is_named(tiny: None, tmp_path: Path) -> None:
    with pytest.raises(BenchmarkFailed, match=r"nothing \(tiny, 2 servers, 2 workers\): a process ended: .*nothing"):
        Side("nothing", TINY, tmp_path)


def test_a_process_that_is_silent_fails_the_benchmark_at_the_deadline(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parameter_servers, "DEADLINE_SECONDS", 0.0)
    with pytest.raises(BenchmarkFailed, match="said nothing for 0 s"):
        Side(SHARD, TINY, tmp_path)


def test_a_part_that_fails_leaves_the_others_their_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Setting) -> Section:
        raise BenchmarkFailed("no such thing")

    monkeypatch.setitem(PARTS, "exchange", fail)
    monkeypatch.setitem(PARTS, "servers", lambda _: Section((), "what it means"))
    setting = Setting(tmp_path, 1, True, tmp_path, lambda _: None)
    sections, faults = measure_parts(["exchange", "servers"], setting)
    assert faults == {"exchange": "no such thing"}
    assert list(in_order(list(sections.values()), format_text)) == ["what it means"]


def test_every_part_can_be_chosen() -> None:
    for part in PARTS:
        assert make_parser().parse_args(["--only", part]).only == [part]
