"""Using a finished run: `evaluate` and `predict`, in one process and without MPI."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import TextIO

import numpy as np

from protos.job_file import JobFileInvalid, read_job_file
from worker.checkpoint import write_atomically
from worker.data.batches import BatchReader
from worker.data.sources import open_features, open_source
from worker.data.split import hold_out
from worker.engine.losses import TARGET_KIND
from worker.errors import DataFault, UsageFault
from worker.evaluation import BATCH, sum_over
from worker.measurements import finite_or_none
from worker.model_file import TrainedModel, read_model


def evaluate_folder(folder: Path, job_path: Path, as_json: bool) -> None:
    """Print loss and accuracy of the model in `folder` on the job's validation data, or its training data without any.

    Raises:
        Fault: the model, the job file or the data is not usable, or they do not fit each other.
    """
    trained = read_model(folder)
    try:
        job = read_job_file(job_path)
    except JobFileInvalid as invalid:
        raise UsageFault("; ".join(str(invalid).splitlines())) from invalid
    target_kind = TARGET_KIND[trained.model.loss_kind]
    if job.data.HasField("validation"):
        dataset, name = open_source(job.data.validation, target_kind), "validation"
    else:
        dataset, name = open_source(job.data.train, target_kind), "train"
        if job.data.validation_fraction > 0:
            _, dataset = hold_out(dataset, job.data.validation_fraction, job.training.seed)
            name = "validation"
    _check_shape(trained, dataset.sample_shape, dataset.place)
    trained.model.check_targets(dataset.targets_to_check, dataset.place)

    reader = BatchReader(dataset, trained.preprocessing, min(BATCH, len(dataset)))
    trained.model.reserve(reader.capacity)
    loss, accuracy = (sum_over(trained.model, reader, 0, len(dataset)) / len(dataset)).tolist()
    result = {"data": name, "samples": len(dataset), "loss": loss, "accuracy": finite_or_none(accuracy)}
    result = {key: value for key, value in result.items() if value is not None}
    print(json.dumps(result) if as_json else "  ".join(f"{key} {_short(value)}" for key, value in result.items()))


def predict_file(folder: Path, input_path: Path, output_path: Path | None) -> None:
    """Print, or write to `output_path`, a CSV line for each sample: the label where the loss knows labels, the outputs.

    Raises:
        Fault: the model or the input is not usable, or they do not fit each other.
    """
    trained = read_model(folder)
    features = open_features(str(input_path))
    shape = features.shape[1:] or (1,)
    if len(shape) == 2 and trained.model.sample_shape == (*shape, 1):
        shape = (*shape, 1)
    _check_shape(trained, shape, str(input_path))
    if output_path is None:
        _write_predictions(trained, features, shape, sys.stdout)
        return
    text = io.StringIO()
    _write_predictions(trained, features, shape, text)
    write_atomically(output_path, text.getvalue().encode())


def _write_predictions(trained: TrainedModel, features: np.ndarray, shape: tuple[int, ...], file: TextIO) -> None:
    model = trained.model
    model.reserve(BATCH)
    width = int(np.prod(model.output_shape))
    labels = TARGET_KIND[model.loss_kind] == "labels"
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*(["label"] if labels else []), *(f"output_{index}" for index in range(width))])
    converted = np.empty((BATCH, *shape), np.float32)
    for first in range(0, len(features), BATCH):
        raw = features[first : first + BATCH].reshape(-1, *shape)
        trained.preprocessing.apply(raw, converted[: len(raw)])
        outputs = model.outputs(converted[: len(raw)]).reshape(len(raw), width)
        for row in outputs:
            writer.writerow([*([int(row.argmax())] if labels else []), *(f"{value:.7g}" for value in row)])


def _check_shape(trained: TrainedModel, shape: tuple[int, ...], place: str) -> None:
    needed = trained.model.sample_shape
    if tuple(shape) != tuple(needed):
        raise DataFault(f"{place}: samples have shape {tuple(shape)}, and the model was trained on {tuple(needed)}")


def _short(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
