"""Tables of numbers in parquet files, a column for each feature and one for the target.

Rules: pyarrow, an extra, is imported here alone and only when a job names such a file. Columns are looked at before any
value is read; then the file is read in batches into one array, so that memory holds the numbers once. Whole numbers
that fit in a byte are kept in one.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from worker.data.files import opened, reachable, size_of
from worker.data.stored_array import Index, StoredArray
from worker.data.table import feature_positions, target_position
from worker.errors import DataFault

MAGIC = b"PAR1"  # at both ends of the file
ENCRYPTED_MAGIC = b"PARE"
BATCH_ROWS = 1 << 16
PANDAS_INDEX = "__index_level_"


class _Column(NamedTuple):
    name: str
    stored: np.dtype[Any]


def read_parquet(path: str, target: str) -> tuple[StoredArray, StoredArray]:
    """(features, targets): every column but `target` in order, and that one; DataFault if that cannot be had."""

    def features_and_target(names: Sequence[str]) -> list[list[int]]:
        at = target_position(path, names, target)
        return [[position for position in range(len(names)) if position != at], [at]]

    arrays = _read(path, features_and_target)
    return arrays[0], arrays[1]


def read_parquet_features(path: str, target: str = "") -> StoredArray:
    """Every column as a feature, but for those of the name `target` beside others."""
    return _read(path, lambda names: [feature_positions(names, target)])[0]


def _read(path: str, grouped: Callable[[Sequence[str]], list[list[int]]]) -> list[StoredArray]:
    """An array for each group of columns that `grouped` makes of their names."""
    size_of(path)
    _check_magic(path)
    pyarrow, parquet = _pyarrow(path)
    try:
        with reachable(path) as here, parquet.ParquetFile(here) as file:
            columns = _columns(path, pyarrow, file.schema_arrow)
            return _read_groups(path, file, columns, grouped([column.name for column in columns]))
    except MemoryError:  # pyarrow's own is one of its exceptions too
        raise
    except (pyarrow.ArrowException, OSError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise DataFault(f"{path}: the parquet file is damaged or cannot be read ({reason}); write it again") from error


def _check_magic(path: str) -> None:
    with opened(path) as file:
        begins = file.read(4)
        file.seek(max(0, file.seek(0, 2) - 4))
        ends = file.read(4)
    if begins == ENCRYPTED_MAGIC or ends == ENCRYPTED_MAGIC:
        raise DataFault(f"{path}: is an encrypted parquet file, which cannot be read; write it without encryption")
    if begins != MAGIC:
        raise DataFault(f"{path}: is not a parquet file (begins with {begins.hex(' ')}); name one that is")
    if ends != MAGIC:
        raise DataFault(f"{path}: the parquet file breaks off (ends with {ends.hex(' ')}); fetch or write it again")


def _pyarrow(path: str) -> tuple[ModuleType, ModuleType]:
    try:
        arrow = import_module("pyarrow")
        parquet = import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataFault(
            f"{path}: a parquet file is read by pyarrow, which cannot be imported ({error}); "
            "pip install 'paceline[parquet]'"
        ) from None
    return arrow, parquet


def _columns(path: str, pyarrow: ModuleType, schema: Any) -> list[_Column]:
    """Name and NumPy type of every column; DataFault naming the first that holds no numbers."""
    if not len(schema):
        raise DataFault(f"{path}: has no columns; at least one is needed")
    columns = []
    for field in schema:
        kinds = pyarrow.types
        if not (kinds.is_integer(field.type) or kinds.is_floating(field.type) or kinds.is_boolean(field.type)):
            raise DataFault(
                f"{path}: column {field.name!r} has type {field.type}; "
                "every column must hold integers, floats or booleans: turn it into numbers or drop it"
            )
        if field.name.startswith(PANDAS_INDEX):
            raise DataFault(
                f"{path}: column {field.name!r} is the row index of pandas, no feature; write it with index=False"
            )
        columns.append(_Column(field.name, np.dtype(field.type.to_pandas_dtype())))
    return columns


def _read_groups(path: str, file: Any, columns: list[_Column], groups: list[list[int]]) -> list[StoredArray]:
    """For each group of column numbers one array (n, columns) in the type that holds all of them."""
    rows = file.metadata.num_rows
    if rows == 0:
        raise DataFault(f"{path}: holds 0 samples; at least one row is needed")
    arrays = [np.empty((rows, len(group)), np.result_type(*(columns[i].stored for i in group))) for group in groups]
    start = 0
    for batch in file.iter_batches(BATCH_ROWS, use_threads=False):  # the other cores are the other ranks'
        stop = start + batch.num_rows
        for values, group in zip(arrays, groups, strict=True):
            for position, number in enumerate(group):
                column = batch.column(number)
                if column.null_count:
                    row = start + int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
                    raise DataFault(
                        f"{path}: row {row} (counted from 0), column {columns[number].name!r} is null; "
                        "every cell must be a number: mend or drop that row"
                    )
                values[start:stop, position] = column.to_numpy(zero_copy_only=False)
        start = stop
    if start != rows:
        raise DataFault(f"{path}: declares {rows} rows but holds {start}; write it again")

    def stored(values: NDArray[Any], group: list[int]) -> StoredArray:
        def locate(index: Index) -> str:
            return f"row {index[0]} (counted from 0), column {columns[group[index[1]]].name!r}"

        return StoredArray(_in_bytes(values), path, locate)

    return [stored(values, group) for values, group in zip(arrays, groups, strict=True)]


def _in_bytes(values: NDArray[Any]) -> NDArray[Any]:
    """The same numbers as uint8 where they are whole numbers from 0 to 255 stored wider."""
    if values.dtype.kind in "iu" and values.itemsize > 1 and values.size and values.min() >= 0 and values.max() <= 255:
        return values.astype(np.uint8)
    return values
