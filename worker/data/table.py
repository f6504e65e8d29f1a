"""Tables of numbers as comma-separated text under a line of column names.

Rules: NumPy's compiled reader does the reading; only when it refuses, or a value is bad, is the file read again, row
by row, to name line and column. Numbers are kept in the smallest of uint8, float32 and float64 that holds every one of
them exactly, so a table of pixels takes an eighth of the memory.
"""

import csv
import io
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, TextIO

import numpy as np
from numpy.typing import NDArray

from worker.data.files import opened, size_of
from worker.data.stored_array import Index, StoredArray
from worker.errors import DataFault

NAMES_SHOWN = 20


def read_csv(path: str, target: str) -> tuple[StoredArray, StoredArray]:
    """(features, targets): every column but `target` in order, and that one; DataFault if that cannot be had."""
    names, values = _read(path)
    position = target_position(path, names, target)
    others = [i for i in range(len(names)) if i != position]
    return _columns(path, names, values, others), _columns(path, names, values, [position])


def read_csv_features(path: str, target: str = "") -> StoredArray:
    """Every column as a feature, but for those of the name `target` beside others."""
    names, values = _read(path)
    return _columns(path, names, values, feature_positions(names, target))


def feature_positions(names: Sequence[str], target: str) -> list[int]:
    """Which of the columns are features to a model that was trained to say `target`."""
    return [position for position, name in enumerate(names) if name != target] or list(range(len(names)))


def target_position(path: str, names: Sequence[str], target: str) -> int:
    """Which of the columns is the target; DataFault unless it is there once and beside others."""
    positions = [i for i, name in enumerate(names) if name == target]
    if not positions:
        raise DataFault(f"{path}: has no column {target!r}; the columns are: {listed(names)}")
    if len(positions) > 1:
        raise DataFault(f"{path}: has {len(positions)} columns named {target!r}; give each column a name of its own")
    if len(names) == 1:
        raise DataFault(f"{path}: has no column besides the target {target!r}; at least one feature is needed")
    return positions[0]


def listed(names: Sequence[str]) -> str:
    """The names for a message, the first of them where they are many."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def _read(path: str) -> tuple[list[str], NDArray[np.float64]]:
    size_of(path)
    with opened(path) as file, _text(file) as text:
        names = _read_names(path, text)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*input contained no data")  # said below, as a fault
                values = np.loadtxt(text, delimiter=",", quotechar='"', comments=None, ndmin=2, dtype=np.float64)
        except UnicodeDecodeError:
            raise _not_text(path) from None
        except ValueError as error:
            raise _diagnosis(path, len(names), str(error)) from None
    if len(values) == 0:
        raise DataFault(f"{path}: holds 0 samples: there is no row under the names in line 1; at least one is needed")
    if values.shape[1] != len(names):
        raise _diagnosis(path, len(names), f"{values.shape[1]} columns of numbers under {len(names)} names")
    return names, values


def _read_names(path: str, text: TextIO) -> list[str]:
    try:
        names = [name.strip() for name in next(csv.reader([text.readline()]))]
    except UnicodeDecodeError:
        raise _not_text(path) from None
    except (csv.Error, StopIteration) as error:
        raise DataFault(
            f"{path}: line 1 cannot be read as column names ({error}); write names separated by commas"
        ) from None
    if not any(names):
        raise DataFault(f"{path}: line 1 is empty; the first line must be the names of the columns")
    if all(_is_number(name) for name in names):
        raise DataFault(
            f"{path}: line 1 holds numbers ({listed(names)}); the first line must be the names of the columns"
        )
    for separator, word in ((";", "semicolons"), ("\t", "tabs")):
        if len(names) == 1 and separator in names[0]:
            raise DataFault(f"{path}: line 1 is separated by {word} ({names[0]!r}); separate the columns by commas")
    return names


def _columns(path: str, names: list[str], values: NDArray[np.float64], positions: Sequence[int]) -> StoredArray:
    def locate(index: Index) -> str:
        line = next(line for row, (line, _) in enumerate(_rows(path)) if row == index[0])
        return f"line {line}, column {names[positions[index[1]]]!r}"

    return StoredArray(_narrowed(values[:, positions]), path, locate)


def _narrowed(values: NDArray[np.float64]) -> NDArray[Any]:
    """The same numbers in the smallest of uint8, float32 and float64 that holds every one exactly."""
    for smaller in (np.uint8, np.float32):
        with np.errstate(invalid="ignore", over="ignore"):  # what does not fit comes out different, and is kept wide
            narrow = values.astype(smaller)
        if np.array_equal(narrow, values):
            return narrow
    return np.ascontiguousarray(values)


def _diagnosis(path: str, columns: int, reason: str) -> DataFault:
    """What is wrong with the first row that is not `columns` numbers."""
    names: list[str] = []
    with opened(path) as file, _text(file) as text:
        names = _read_names(path, text)
    try:
        for line, cells in _rows(path):
            if len(cells) != columns:
                return DataFault(
                    f"{path}: line {line} has {len(cells)} columns, line 1 names {columns}; mend or drop that line"
                )
            for name, cell in zip(names, cells, strict=True):
                if not _is_number(cell):
                    found = f"{cell!r} is not a number" if cell.strip() else "is empty"
                    return DataFault(f"{path}: line {line}, column {name!r}: {found}; every cell must be a number")
    except csv.Error as error:
        reason = str(error)
    return DataFault(f"{path}: cannot be read as a table of numbers ({reason.splitlines()[0]}); write it again")


def _rows(path: str) -> Iterator[tuple[int, list[str]]]:
    """(line number from 1, cells) of every row under the names; empty lines are no rows."""
    with opened(path) as file, _text(file) as text:
        text.readline()
        reader = csv.reader(text)
        for cells in reader:
            if cells:
                yield reader.line_num + 1, cells


def _text(file: BinaryIO) -> TextIO:
    return io.TextIOWrapper(file, encoding="utf-8-sig", newline="")


def _not_text(path: str) -> DataFault:
    return DataFault(f"{path}: is not UTF-8 text; save it as comma-separated text in UTF-8")


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell  # Python reads 1_000, NumPy does not
