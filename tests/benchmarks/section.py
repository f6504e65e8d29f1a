"""A part of `make bench` beside the networks' training: what it is given and what it comes to."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.benchmarks.table import Table


class Setting(NamedTuple):
    """What the command line asks of every part."""

    peers_python: Path
    rounds: int
    quick: bool  # to see that all runs: figures need not mean anything
    scratch: Path  # a folder
    say: Callable[[str], None]  # takes one line as each run ends


class Section(NamedTuple):
    """Tables, and below them what their figures mean; or why there are none."""

    tables: Sequence[Table]
    caption: str
    left_out: str = ""  # what this machine lacks


Part = Callable[[Setting], Section]  # raises BenchmarkFailed
