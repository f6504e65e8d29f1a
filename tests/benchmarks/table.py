"""The results as tables, for a terminal and for the README.

Rules: pure, text in and text out. A figure is the median of the rounds and [lowest .. highest]; a ratio is ours over
a peer with as many ranks, taken round by round: the best one, and in a column of its own PyTorch's eager mode.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from tests.benchmarks.cases import Case
from tests.benchmarks.contenders import EAGER, Contender
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

ABSENT = "absent"


class Table(NamedTuple):
    """A heading for each column, and rows as long."""

    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def throughput_table(results: Results, cases: Sequence[Case], contenders: Sequence[Contender]) -> Table:
    """Samples a second, against the best peer and PyTorch, and two ranks against the same side's one."""
    rows = []
    for case, contender in _timed(cases, contenders):
        peers = _peers(results, case, contender, contenders)
        eager = [peer for peer in peers if peer.side == EAGER]
        rows.append(
            (
                *(case.title, str(contender.ranks), contender.name),
                _figure_cell(results, case, contender, THROUGHPUT),
                _ratio_cell(results, case, contender, peers, THROUGHPUT),
                _ratio_cell(results, case, contender, eager, THROUGHPUT),
                _scaling_cell(results, case, contender, contenders),
            )
        )
    headings = ("network", "ranks", "program", "samples/s", "ours / best peer", "ours / PyTorch eager", "over 1 rank")
    return Table(headings, rows)


def footprint_table(results: Results, cases: Sequence[Case], contenders: Sequence[Contender]) -> Table:
    """Start-up and memory, against the best peer."""
    rows = []
    for case, contender in _timed(cases, contenders):
        peers = _peers(results, case, contender, contenders)
        cells = [
            cell
            for metric in (FIRST_STEP, MEMORY)
            for cell in (
                _figure_cell(results, case, contender, metric),
                _ratio_cell(results, case, contender, peers, metric),
            )
        ]
        rows.append((case.title, str(contender.ranks), contender.name, *cells))
    headings = ("network", "ranks", "program", FIRST_STEP.title, "ours / best peer", MEMORY.title, "ours / best peer")
    return Table(headings, rows)


def product_table(results: Results, cases: Sequence[Case], whole: Contender, products: Contender) -> Table:
    """Our step on one rank beside its matrix products alone: what share of it they are, and how fast they run."""
    rows = []
    for case in cases:
        steps = [case.batch_size / run.samples_per_second for run in results[case.name, whole.name]]
        alone = [case.batch_size / run.samples_per_second for run in results[case.name, products.name]]
        speeds = [
            run.flop * run.samples_per_second / case.batch_size / 1e9 for run in results[case.name, products.name]
        ]
        rows.append(
            (
                *(case.title, str(whole.ranks), whole.name),
                format_spread(spread(step * 1e3 for step in steps), 2),
                format_spread(spread(seconds * 1e3 for seconds in alone), 2),
                format_spread(spread(speeds), 1),
                format_spread(ratio_spread(alone, steps), 2),
                format_spread(ratio_spread(steps, alone), 2),
            )
        )
    headings = (
        *("network", "ranks", "program", "ms a step", "ms of matrix products alone", "their GFLOP/s"),
        *("products / step", "step / products"),
    )
    return Table(headings, rows)


def _timed(cases: Sequence[Case], contenders: Sequence[Contender]) -> Iterator[tuple[Case, Contender]]:
    """A row each: ours before the peers of as many ranks."""
    ordered = sorted(contenders, key=lambda contender: (contender.ranks, not contender.ours))
    return ((case, contender) for case in cases for contender in ordered if case.kind in contender.kinds)


def _values(results: Results, case: Case, contender: Contender, metric: Metric) -> list[float]:
    return [getattr(run, metric.field) / metric.unit for run in results[case.name, contender.name]]


def _peers(results: Results, case: Case, ours: Contender, contenders: Sequence[Contender]) -> list[Contender]:
    """Whom a row of ours is compared with: who ran on as many ranks; nobody for a peer's own row."""
    if not ours.ours:
        return []
    return [c for c in contenders if not c.ours and c.ranks == ours.ranks and results.get((case.name, c.name))]


def _figure_cell(results: Results, case: Case, contender: Contender, metric: Metric) -> str:
    values = _values(results, case, contender, metric)
    return format_spread(spread(values), metric.digits) if values else ABSENT


def _ratio_cell(results: Results, case: Case, contender: Contender, peers: Sequence[Contender], metric: Metric) -> str:
    """Ours over the best of `peers`; empty without any."""
    if not peers:
        return ""
    figures = [_values(results, case, peer, metric) for peer in peers]
    best = (max if metric.more_is_better else min)(figures, key=lambda values: spread(values).median)
    return format_spread(ratio_spread(_values(results, case, contender, metric), best), 2)


def _scaling_cell(results: Results, case: Case, contender: Contender, contenders: Sequence[Contender]) -> str:
    """Throughput over that of the same side's one-rank row; empty for that row itself."""
    single = next((c for c in contenders if c.ranks == 1 and c.side == contender.side), None)
    if contender.ranks == 1 or single is None:
        return ""
    if not all(results.get((case.name, name)) for name in (contender.name, single.name)):
        return ""
    ratio = ratio_spread(_values(results, case, contender, THROUGHPUT), _values(results, case, single, THROUGHPUT))
    return format_spread(ratio, 2)


def format_spread(values: Spread, digits: int) -> str:
    """Such as `1.40 [1.35 .. 1.45]`; a range that rounds to the median is left out."""
    median, low, high = (f"{value:,.{digits}f}" for value in values)
    return median if low == high else f"{median} [{low} .. {high}]"


def format_text(table: Table) -> str:
    """Columns of equal width; a network is named once, and where one has several rows it stands apart."""
    widths = [max(map(len, column)) for column in zip(table.headings, *table.rows, strict=True)]
    lines = [_text_line(table.headings, widths), _text_line(["-" * width for width in widths], widths)]
    above = ""
    grouped = len({row[0] for row in table.rows}) < len(table.rows)
    for row in table.rows:
        if grouped and above and row[0] != above:
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
