"""Targets in the form a loss takes: whole-number labels, or rows of values.

Rules: `labels` are int64 (n,), or (n, T) for the positions of sequences, whole and not negative; whether they fit the
model's outputs is the model's to say.
`values` are float32 (n, k). Faults name the row.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from worker.data.stored_array import Progress, StoredArray, check_finite, row_blocks, unwatched
from worker.errors import DataFault

LARGEST_LABEL = np.float64(2**53)  # up to here a float64 holds every whole number


def as_targets(array: StoredArray, kind: str, progress: Progress = unwatched) -> NDArray[Any]:
    """Numbers as targets, DataFault otherwise; `kind` "labels" -> int64 (n,) or (n, T), "values" -> float32 (n, k)."""
    check_finite(array, "targets", progress)
    if kind == "labels":
        return _as_labels(array, progress)
    if kind == "values":
        rows = array.values.reshape(len(array.values), -1)
        return np.ascontiguousarray(rows, dtype=np.float32)
    raise ValueError(f"target kind {kind!r} is neither 'labels' nor 'values'")


def _as_labels(array: StoredArray, progress: Progress) -> NDArray[Any]:
    values, place, locate = array
    if values.size != len(values) and values.ndim > 2:
        raise DataFault(
            f"{place}: the loss needs one label for each sample or position, this array has shape {values.shape}; "
            "give class numbers 0, 1, 2, ... (are features and targets exchanged?)"
        )
    labels = values.reshape(-1) if values.size == len(values) else values
    for start, block in row_blocks(labels, progress):
        for fault, bad in _label_faults(block).items():
            if bad is not None and bad.any():
                row, *inner = (int(index) for index in np.unravel_index(int(bad.argmax()), bad.shape))
                first = (start + row, *inner)
                where = locate(first + (0,) * (values.ndim - len(first)))
                raise DataFault(
                    f"{place}: label {labels[first]} at {where} {fault}; labels are class numbers 0, 1, 2, ..."
                )
    if labels.ndim > 1 and labels.dtype.kind in "iu":
        # Left as stored, and mapped where they are: as int64 the labels of bytes would take eight times their file.
        return labels
    return np.ascontiguousarray(labels, dtype=np.int64)


def _label_faults(labels: NDArray[Any]) -> dict[str, NDArray[np.bool_] | None]:
    """What is wrong -> where; None where a type cannot have it."""
    return {
        "is not a whole number": labels != np.rint(labels) if labels.dtype.kind == "f" else None,
        "is negative": labels < 0 if labels.dtype.kind in "if" else None,
        "is too large for a class number": labels > LARGEST_LABEL if labels.dtype.kind != "b" else None,
    }
