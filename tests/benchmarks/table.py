"""The results as tables, for a terminal and for the README.

Rules: pure, text in and text out. A figure is the median of the rounds and [lowest .. highest]; a ratio is ours over
the best peer with as many ranks, taken round by round.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tests.benchmarks.cases import Case
from tests.benchmarks.contenders import Contender
from tests.benchmarks.measurement import Measurement
from tests.benchmarks.spread import Spread, ratio_spread, spread

Results = Mapping[tuple[str, str], Sequence[Measurement]]  # by the names of a case and of a contender


class Metric(NamedTuple):
    """A figure of Measurement and how it is shown."""

    title: str
    field: str
    unit: float  # what 1 in the table stands for
    digits: int
    more_is_better: bool


THROUGHPUT = Metric("samples/s", "samples_per_second", 1, 0, True)
FIRST_STEP = Metric("seconds to first step", "seconds_to_first_step", 1, 2, False)
MEMORY = Metric("peak MB a rank", "peak_memory_bytes", 1e6, 0, False)


class Table(NamedTuple):
    """A heading for each column, and rows as long."""

    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def throughput_table(results: Results, cases: Sequence[Case], contenders: Sequence[Contender]) -> Table:
    """Samples a second, against the best peer, and two ranks against the same side's one."""
    rows = []
    for case in cases:
        for contender in contenders:
            rows.append(
                (
                    *(case.title, str(contender.ranks), contender.name),
                    *_metric_cells(results, case, contender, contenders, THROUGHPUT),
                    _scaling_cell(results, case, contender, contenders),
                )
            )
    headings = ("network", "ranks", "program", "samples/s", "ours / best peer", "over 1 rank")
    return Table(headings, rows)


def footprint_table(results: Results, cases: Sequence[Case], contenders: Sequence[Contender]) -> Table:
    """Start-up and memory, against the best peer."""
    rows = []
    for case in cases:
        for contender in contenders:
            rows.append(
                (
                    *(case.title, str(contender.ranks), contender.name),
                    *_metric_cells(results, case, contender, contenders, FIRST_STEP),
                    *_metric_cells(results, case, contender, contenders, MEMORY),
                )
            )
    headings = ("network", "ranks", "program", FIRST_STEP.title, "ours / best peer", MEMORY.title, "ours / best peer")
    return Table(headings, rows)


def _values(results: Results, case: Case, contender: Contender, metric: Metric) -> list[float]:
    return [getattr(run, metric.field) / metric.unit for run in results[case.name, contender.name]]


def _metric_cells(
    results: Results, case: Case, contender: Contender, contenders: Sequence[Contender], metric: Metric
) -> tuple[str, str]:
    """The figure, and for ours its ratio to the best peer of as many ranks."""
    values = _values(results, case, contender, metric)
    figure = format_spread(spread(values), metric.digits)
    peers = [_values(results, case, c, metric) for c in contenders if not c.ours and c.ranks == contender.ranks]
    if not contender.ours or not peers:
        return figure, ""
    best = (max if metric.more_is_better else min)(peers, key=lambda peer: spread(peer).median)
    return figure, format_spread(ratio_spread(values, best), 2)


def _scaling_cell(results: Results, case: Case, contender: Contender, contenders: Sequence[Contender]) -> str:
    """Throughput over that of the same side's one-rank row; empty for that row itself."""
    if contender.ranks == 1:
        return ""
    single = next((c for c in contenders if c.ranks == 1 and c.side == contender.side), None)
    if single is None:
        return ""
    ratio = ratio_spread(_values(results, case, contender, THROUGHPUT), _values(results, case, single, THROUGHPUT))
    return format_spread(ratio, 2)


def format_spread(values: Spread, digits: int) -> str:
    """Such as `1.40 [1.35 .. 1.45]`; a range that rounds to the median is left out."""
    median, low, high = (f"{value:,.{digits}f}" for value in values)
    return median if low == high else f"{median} [{low} .. {high}]"


def format_text(table: Table) -> str:
    """Columns of equal width; a network is named once."""
    widths = [max(map(len, column)) for column in zip(table.headings, *table.rows, strict=True)]
    lines = [_text_line(table.headings, widths), _text_line(["-" * width for width in widths], widths)]
    above = ""
    for row in table.rows:
        if above and row[0] != above:
            lines.append("")
        lines.append(_text_line(["" if row[0] == above else row[0], *row[1:]], widths))
        above = row[0]
    return "\n".join(lines)


def _text_line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def format_markdown(table: Table) -> str:
    """A Markdown table: text to the left, figures to the right."""
    rules = ["---" if index in (0, 2) else "---:" for index in range(len(table.headings))]
    lines = [table.headings, rules, *table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
