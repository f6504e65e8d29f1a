"""What a model says to new samples, as CSV, JSON lines or an npz archive.

Rules: a writer takes outputs (n, *output_shape) batch by batch; CSV and JSON lines are written as they come. With
`labels` each sample, or each position of a sequence, also has the class of its highest output.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO, Final, TypeAlias

import numpy as np

from worker.errors import UsageFault

Writer: TypeAlias = Callable[[Iterable[np.ndarray], tuple[int, ...], bool, BinaryIO], None]


def write_csv(batches: Iterable[np.ndarray], output_shape: tuple[int, ...], labels: bool, file: BinaryIO) -> None:
    """A line for each sample under a line of names: label, or label_0 ... of a sequence, then output_0 ..."""
    positions = output_shape[0] if len(output_shape) > 1 else None
    names = ["label"] if positions is None else [f"label_{position}" for position in range(positions)]
    width = int(np.prod(output_shape))
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    try:
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*(names if labels else []), *(f"output_{index}" for index in range(width))])
        for outputs in batches:
            predicted = outputs.argmax(axis=-1).reshape(len(outputs), -1)
            for label, row in zip(predicted.tolist(), outputs.reshape(len(outputs), width), strict=True):
                writer.writerow([*(label if labels else []), *(f"{value:.7g}" for value in row)])
    finally:
        text.detach()  # or it would close the caller's file, also when that one's reader has left


def write_json_lines(
    batches: Iterable[np.ndarray], output_shape: tuple[int, ...], labels: bool, file: BinaryIO
) -> None:
    """An object for each sample: {"label": 3, "outputs": [...]}; what is not a finite number is null."""
    for outputs in batches:
        predicted = outputs.argmax(axis=-1).tolist()
        for label, row in zip(predicted, outputs, strict=True):
            held = row.astype(object)
            held[~np.isfinite(row)] = None
            line = ({"label": label} if labels else {}) | {"outputs": held.tolist()}
            file.write(json.dumps(line).encode() + b"\n")
    file.flush()


def write_npz(batches: Iterable[np.ndarray], output_shape: tuple[int, ...], labels: bool, file: BinaryIO) -> None:
    """Arrays `outputs` float32 (n, *output_shape) and, with labels, `labels` int64 (n, *output_shape[:-1])."""
    outputs = np.concatenate([np.empty((0, *output_shape), np.float32), *batches])
    np.savez(file, outputs=outputs, **({"labels": outputs.argmax(axis=-1)} if labels else {}))


WRITERS: Final[dict[str, Writer]] = {"csv": write_csv, "npz": write_npz, "jsonl": write_json_lines}


def choose_writer(form: str | None, path: Path | None) -> Writer:
    """By `form`, else by the ending of `path`, else CSV.

    Raises:
        UsageFault: the ending is none of a form, or npz was asked for and no file named.
    """
    if form is None:
        form = path.suffix.lower().removeprefix(".") if path else "csv"
    elif form == "json":
        form = "jsonl"
    if form not in WRITERS:
        endings = ", ".join(f".{name}" for name in WRITERS)
        raise UsageFault(f"{path}: its ending is none of {endings}; give it one, or say --format")
    if form == "npz" and path is None:
        raise UsageFault("--format npz: is binary and not for standard output; name a file with -o")
    return WRITERS[form]
