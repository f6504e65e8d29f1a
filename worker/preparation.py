"""Everything a job names, opened and held against each other before any file is written or any rank waits.

What cannot work is found here: data that is not there, layers that do not fit, labels the model has no output for,
tokens outside the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from protos import job_pb2
from protos.environment import PARAMETERS_ALLOWED
from worker.data.augmentation import Augmentation, make_augmentation
from worker.data.preprocessing import Preprocessing, make_preprocessing
from worker.data.sharding import steps_per_epoch
from worker.data.sources import Dataset, open_source
from worker.data.split import hold_out
from worker.data.stored_array import Progress, row_blocks, unwatched
from worker.data.tokens import check_tokens
from worker.engine.layers.embedding import Embedding
from worker.engine.losses import TARGET_KIND
from worker.engine.model import Model
from worker.engine.sample_shape import implies_channel
from worker.errors import DataFault, ModelFault, UsageFault
from worker.metrics import MetricSums


@dataclass(frozen=True)
class Prepared:
    """A job that fits together; the model has no memory yet."""

    train: Dataset
    validation: Dataset | None
    preprocessing: Preprocessing
    model: Model
    augmentation: Augmentation | None = None  # of the training samples

    @property
    def maps_data(self) -> bool:
        """Some of the data is read from memory-mapped files."""
        return self.train.is_mapped or (self.validation is not None and self.validation.is_mapped)


def prepare(job: job_pb2.JobSpec, progress: Progress = unwatched) -> Prepared:
    """Open the data and build the model; `progress` is told that passes over the data go on.

    Raises:
        DataFault, ModelFault: naming the file, the row or the layer.
    """
    target_kind = TARGET_KIND[str(job.loss.WhichOneof("kind"))]
    lone_channel = implies_channel(job.model)

    def opened(source: job_pb2.Source) -> Dataset:
        return replace(open_source(source, target_kind, progress), lone_channel=lone_channel)

    train = opened(job.data.train)
    validation = None
    if job.data.HasField("validation"):
        validation = opened(job.data.validation)
        if validation.sample_shape != train.sample_shape:
            raise DataFault(
                f"{validation.place}: samples of shape {validation.sample_shape}, "
                f"but the training set {train.place} has {train.sample_shape}; give both the same features"
            )
    elif job.data.validation_fraction > 0:
        train, validation = hold_out(train, job.data.validation_fraction, job.training.seed)
    augmentation = make_augmentation(job.data, job.training.seed, train.sample_shape, train.place)
    model = Model(job.model, job.loss, train.sample_shape)
    if job.metrics and validation is None:
        raise DataFault(
            "metrics: are computed over validation samples, and there are none: "
            "give data.validation or data.validation_fraction"
        )
    check_targets(model, train, progress)
    if validation is not None and validation.targets is not train.targets:
        check_targets(model, validation, progress)
    if validation is not None:
        MetricSums(job.metrics, model, validation.targets)  # refuses what does not fit the model
    preprocessing = make_preprocessing(job.data, train, progress)
    first_layer = model.layers[0].layer
    if isinstance(first_layer, Embedding):
        for dataset in (train, validation):
            if dataset is not None:
                check_tokens(dataset, preprocessing, first_layer, progress)
    return Prepared(train, validation, preprocessing, model, augmentation)


def check_targets(model: Model, dataset: Dataset, progress: Progress = unwatched) -> None:
    """DataFault naming the first target that cannot belong to the model's outputs; reads a few megabytes at a time."""
    for first, block in row_blocks(dataset.targets, progress):
        model.check_targets(block, dataset.place, first)


def check_shares(prepared: Prepared, job: job_pb2.JobSpec, world_size: int) -> None:
    """Hold the samples that come together in a step against the layers.

    Raises:
        ModelFault: naming a layer that so few samples cannot train.
        UsageFault: there are local steps, and ranks that would have nothing to take them on; or guests may come, who
            would not know all of the model.
    """
    samples = len(prepared.train)
    batch = min(job.training.batch_size or samples, samples)
    if job.sync.HasField("local") and batch < world_size:
        raise UsageFault(
            f"sync.local: a batch of {batch} leaves some of the {world_size} ranks without a sample to take their own "
            "steps on; raise training.batch_size or take fewer workers"
        )
    if job.sync.parameter_server.guests and prepared.model.state_count:
        raise UsageFault(
            "sync.parameter_server.guests: true beside running statistics (batch_norm), which guests do not know: "
            "take layer_norm, or no guests"
        )
    shards = job.training.virtual_shards if job.training.reproducible else 0
    share = -(-batch // (shards or world_size))
    try:
        prepared.model.check_batch(min(share, job.training.micro_batch or share), batch)
    except ModelFault as fault:
        if not shards:
            raise
        raise ModelFault(
            f"training.virtual_shards: {shards} cut a batch of {batch} into pieces of {share}; lower it, for {fault}"
        ) from fault


def check_size(prepared: Prepared, environ: Mapping[str, str]) -> None:
    """Hold the model against what the coordinator allows, before it has memory; ModelFault naming both numbers."""
    count, allowed = prepared.model.parameter_count, environ.get(PARAMETERS_ALLOWED)
    if allowed is not None and count > int(allowed):
        raise ModelFault(
            f"model: has {count} parameters, and the coordinator's limit is job.parameters={allowed}: make it smaller"
        )


def remark(prepared: Prepared, job: job_pb2.JobSpec) -> str | None:
    """What a person should know of a job that can run, though perhaps not as it was meant."""
    if not job.sync.HasField("local"):
        return None
    steps = steps_per_epoch(len(prepared.train), job.training.batch_size)
    if job.sync.local.steps <= steps:
        return None
    return (
        f"sync.local.steps: {job.sync.local.steps} is more than the {steps} of an epoch, whose end is a meeting too: "
        f"replicas meet every {steps}"
    )
