"""model.safetensors: what a run leaves for others, readable by the safetensors library alone.

Every parameter, and every array of a layer's state, under `<index>.<layer>.<name>`; in the metadata the job, its
preprocessing and the sample shape, all as text, so that `evaluate` and `predict` need nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from protos import job_pb2
from protos.job_file import JobFileInvalid, parse_job, to_yaml
from worker.checkpoint import read_safetensors, write_safetensors
from worker.data.preprocessing import Preprocessing
from worker.engine.model import Model
from worker.errors import CheckpointFault

FILE_NAME = "model.safetensors"


class TrainedModel(NamedTuple):
    """A model ready to predict."""

    model: Model
    preprocessing: Preprocessing
    job: job_pb2.JobSpec


def write_model(folder: Path, job: job_pb2.JobSpec, model: Model, preprocessing: Preprocessing) -> None:
    """Write folder/model.safetensors atomically."""
    metadata = {
        "format": "paceline",
        "name": job.name,
        "job": to_yaml(job),
        "preprocessing": preprocessing.to_json(),
        "sample_shape": json.dumps(list(model.sample_shape)),
    }
    write_safetensors(folder / FILE_NAME, model.named_parameters() | model.named_state(), metadata)


def read_model(folder: Path) -> TrainedModel:
    """Read what `write_model` wrote.

    Raises:
        CheckpointFault: the file is not there, damaged, or was not written by a run.
    """
    path = folder / FILE_NAME
    tensors, metadata = read_safetensors(path)
    try:
        job = parse_job(metadata["job"])
        preprocessing = Preprocessing.from_json(metadata["preprocessing"])
        sample_shape = tuple(int(size) for size in json.loads(metadata["sample_shape"]))
    except (KeyError, ValueError, JobFileInvalid) as error:
        raise CheckpointFault(f"{path}: was not written by a run of Paceline: {error}") from error
    model = Model(job.model, job.loss, sample_shape)
    model.attach(np.zeros(model.parameter_count, np.float32))
    for name, view in (model.named_parameters() | model.named_state()).items():
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != view.shape:
            found = "nothing" if tensor is None else f"shape {tensor.shape}"
            raise CheckpointFault(f"{path}: {name} needs shape {view.shape} and has {found}; the file is damaged")
        view[...] = tensor
    return TrainedModel(model, preprocessing, job)
