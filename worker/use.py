"""Using a finished run: `evaluate` and `predict`, in one process and without MPI."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from protos.job_file import JobFileInvalid, read_job_file
from protos.urls import shown
from worker.checkpoint import replacing
from worker.data.batches import BatchReader
from worker.data.sources import open_features, open_source
from worker.data.split import hold_out
from worker.data.stores import local_path
from worker.data.text import read_windows
from worker.data.tokens import check_batch, check_tokens
from worker.engine.layers.embedding import Embedding
from worker.engine.losses import TARGET_KIND
from worker.errors import DataFault, OutputFault, UsageFault
from worker.evaluation import conclude, samples_at_once, sum_over
from worker.metrics import MetricSums
from worker.model_file import TrainedModel, read_model
from worker.output_folder import check_outside_run
from worker.predictions import choose_writer
from worker.preparation import check_targets

OUTPUT_REMEDY: Final = "name another file with -o"
ARRAY_ENDINGS: Final = (".npy", ".npz", ".csv", ".parquet")  # hold tokens as an array, also for a model of text


def evaluate_folder(folder: Path, job_path: Path, as_json: bool) -> None:
    """Print loss, accuracy and the job's metrics of the model in `folder`.

    They are computed on the job's validation data, or its training data without any.

    Raises:
        Fault: the model, the job file or the data is not usable, or they do not fit each other.
    """
    trained = read_model(folder)
    try:
        job = read_job_file(job_path)
    except JobFileInvalid as invalid:
        raise UsageFault(str(invalid)) from invalid
    target_kind = TARGET_KIND[trained.model.loss_kind]
    if job.data.HasField("validation"):
        dataset, name = open_source(job.data.validation, target_kind), "validation"
    else:
        dataset, name = open_source(job.data.train, target_kind), "train"
        if job.data.validation_fraction > 0:
            _, dataset = hold_out(dataset, job.data.validation_fraction, job.training.seed)
            name = "validation"
    dataset = replace(dataset, lone_channel=len(trained.model.sample_shape) != dataset.features.ndim - 1)
    _check_shape(trained, dataset.sample_shape, dataset.place)
    check_targets(trained.model, dataset)
    first_layer = trained.model.layers[0].layer
    if isinstance(first_layer, Embedding):
        check_tokens(dataset, trained.preprocessing, first_layer)

    reader = BatchReader(dataset, trained.preprocessing, samples_at_once(trained.model, len(dataset)))
    trained.model.reserve(reader.capacity)
    counted = MetricSums(job.metrics, trained.model, dataset.targets)
    sums = sum_over(trained.model, reader, 0, len(dataset), counted)
    loss, accuracy, metrics = conclude(sums, len(dataset), counted)
    if not math.isfinite(loss):
        raise DataFault(f"{dataset.place}: the model's loss on it is {loss:g}; look for enormous values in it")
    result: dict[str, Any] = {"data": name, "samples": len(dataset), "loss": loss, "accuracy": accuracy}
    result = {key: value for key, value in result.items() if value is not None}
    print(
        json.dumps(result | ({"metrics": metrics} if metrics else {})) if as_json else _evaluation_text(result, metrics)
    )


def predict_file(folder: Path, place: str | Path, output_path: Path | None, form: str | None = None) -> None:
    """Print, or write to `output_path`, what the model says to each sample; labels where the loss knows labels.

    A model of text reads text: its samples are the windows of the file, and it says of each byte what comes behind it.

    Args:
        place: the input, a path or a URL.
        form: a key of predictions.WRITERS; None goes by the ending of `output_path`, and is CSV without one.

    Raises:
        Fault: the model or the input is not usable, or they do not fit each other, or the form is not to be had.
    """
    writer = choose_writer(form, output_path)
    if output_path is None and sys.stdout is None:
        raise OutputFault(f"standard output: is closed; {OUTPUT_REMEDY}")
    trained = read_model(folder)
    input_path = Path(local_path(str(place)))
    if output_path is not None:
        check_outside_run(folder, output_path, OUTPUT_REMEDY)
        if os.path.exists(output_path) and output_path.samefile(input_path):
            raise OutputFault(f"{output_path}: is the input; {OUTPUT_REMEDY}")
    features = _open_input(trained, input_path)
    shape = features.shape[1:] or (1,)
    if len(shape) == 2 and trained.model.sample_shape == (*shape, 1):
        shape = (*shape, 1)
    _check_shape(trained, shape, shown(str(place)))
    labels = TARGET_KIND[trained.model.loss_kind] == "labels"
    batches = _outputs(trained, features, shape, shown(str(place)))
    if output_path is None:
        writer(batches, trained.model.output_shape, labels, sys.stdout.buffer)
        return
    with replacing(output_path, OUTPUT_REMEDY) as temporary, temporary.open("wb") as file:
        writer(batches, trained.model.output_shape, labels, file)


def _open_input(trained: TrainedModel, path: Path) -> np.ndarray:
    """The features of the samples in the file: an array, or the bytes of a text where the model was trained on text."""
    source = trained.job.data.train
    kind = str(source.WhichOneof("kind"))
    if kind != "text" or path.suffix.lower() in ARRAY_ENDINGS:
        # A table may still hold what the model was trained to say.
        return open_features(str(path), getattr(getattr(source, kind, None), "target", ""))
    windows, rest = read_windows(str(path), source.text.context)
    if rest:
        said = f"the last {rest} bytes fill no window of {source.text.context} bytes and are left out"
        print(f"note: {path}: {said}", file=sys.stderr, flush=True)
    return windows.values


def _outputs(trained: TrainedModel, features: np.ndarray, shape: tuple[int, ...], place: str) -> Iterator[np.ndarray]:
    """The model's outputs (n, *output_shape), a batch at a time."""
    at_once = samples_at_once(trained.model, len(features))
    trained.model.reserve(at_once)
    first_layer = trained.model.layers[0].layer
    converted = np.empty((at_once, *shape), np.float32)
    for first in range(0, len(features), at_once):
        raw = features[first : first + at_once].reshape(-1, *shape)
        trained.preprocessing.apply(raw, converted[: len(raw)])
        if isinstance(first_layer, Embedding):
            check_batch(converted[: len(raw)], np.arange(first, first + len(raw)), first_layer, place)
        yield trained.model.outputs(converted[: len(raw)])


def _check_shape(trained: TrainedModel, shape: tuple[int, ...], place: str) -> None:
    needed = trained.model.sample_shape
    if tuple(shape) != tuple(needed):
        hint = ": leave out what is no feature, such as the target" if math.prod(shape) > math.prod(needed) else ""
        raise DataFault(
            f"{place}: samples have shape {tuple(shape)}, and the model was trained on {tuple(needed)}{hint}"
        )


def _evaluation_text(result: dict[str, Any], metrics: dict[str, Any]) -> str:
    """One line of numbers, then a line for each list and for each row of a matrix."""
    numbers = result | {name: value for name, value in metrics.items() if not isinstance(value, list)}
    lines = ["  ".join(f"{name} {_short(value)}" for name, value in numbers.items())]
    for name, value in metrics.items():
        if isinstance(value, list):
            nested = isinstance(value[0], list)
            lines.append(f"{name}{' (rows: label, columns: predicted)' if nested else ''}")
            lines += ["  " + " ".join(f"{_short(cell):>7}" for cell in row) for row in (value if nested else [value])]
    return "\n".join(lines)


def _short(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
