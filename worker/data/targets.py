"""Targets in the form a loss takes: whole-number labels, or rows of values.

Rules: `labels` are int64 (n,), whole and not negative; whether they fit the model's outputs is the model's to say.
`values` are float32 (n, k). Faults name the row.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from worker.data.stored_array import StoredArray, check_finite
from worker.errors import DataFault

LARGEST_LABEL = np.float64(2**53)  # up to here a float64 holds every whole number


def as_targets(array: StoredArray, kind: str) -> NDArray[Any]:
    """Numbers as targets: `kind` "labels" -> int64 (n,), "values" -> float32 (n, k); DataFault if they are not that."""
    check_finite(array, "targets")
    if kind == "labels":
        return _as_labels(array)
    if kind == "values":
        rows = array.values.reshape(len(array.values), -1)
        return np.ascontiguousarray(rows, dtype=np.float32)
    raise ValueError(f"target kind {kind!r} is neither 'labels' nor 'values'")


def _as_labels(array: StoredArray) -> NDArray[np.int64]:
    values, place, locate = array
    if values.size != len(values):
        raise DataFault(
            f"{place}: the loss needs one label for each sample, this array has shape {values.shape}; "
            "give class numbers 0, 1, 2, ... (are features and targets exchanged?)"
        )
    column = values.reshape(-1)
    faults = {
        "is not a whole number": column != np.rint(column) if column.dtype.kind == "f" else None,
        "is negative": column < 0 if column.dtype.kind in "if" else None,
        "is too large for a class number": column > LARGEST_LABEL if column.dtype.kind != "b" else None,
    }
    for fault, bad in faults.items():
        if bad is not None and bad.any():
            row = int(bad.argmax())
            where = locate((row,) + (0,) * (values.ndim - 1))
            raise DataFault(f"{place}: label {column[row]} at {where} {fault}; labels are class numbers 0, 1, 2, ...")
    return np.ascontiguousarray(column, dtype=np.int64)
