"""The gradient exchange a job asks for, behind one verb.

`step` turns every rank's gradient into the next weights. Which way it goes (shared memory and MPI, or a parameter
server, or replicas that meet now and then) is chosen here, from `sync` in the job file, and nowhere else.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from protos import job_pb2
from worker.checkpoint import Checkpoint
from worker.engine.layers.layer import Finished
from worker.engine.model import Model
from worker.engine.params import decayed_ranges
from worker.errors import CheckpointFault
from worker.initial_weights import InitialWeights
from worker.invitation import Invitation
from worker.sync import replica_state
from worker.sync.all_reduce import AllReduceExchange
from worker.sync.compressed_reduction import Wire
from worker.sync.local_steps import LocalStepsExchange
from worker.sync.reduction import Reduction
from worker.sync.reproducible import ReproducibleExchange, ShardBuffers
from worker.sync.statistics import ExchangeStatistics
from worker.sync.world import World
from worker.update import make_update

# What rides along with the gradient: two sums, and what is to be done behind the step, where any rank asks for it.
TOTALS = ("loss", "correct", "report", "checkpoint", "stop")


class Exchange(Protocol):
    """What the training loop knows of any exchange."""

    parameters: np.ndarray  # (parameter_count,) float32
    gradient: np.ndarray  # (parameter_count,) float32, this rank's sum
    # TOTALS, then the sums of layers with state: this rank's before step, all ranks' after.
    totals: np.ndarray  # (len(TOTALS) + model.sum_count,) float64
    statistics: ExchangeStatistics
    note: str | None  # lines a person should know, such as a fallback
    in_step: bool  # all ranks take each step together, and see the same `totals` behind it
    finished: Finished | None  # to be told while backward runs from which element on `gradient` is finished
    # Mean loss of the first step, where `totals` hold the sums of several; None where they hold its own, or before.
    first_loss: float | None
    shard_buffers: ShardBuffers | None  # where the virtual shards' sums go; None: `gradient` and `totals` are pushed

    @property
    def guests(self) -> int:
        """Workers beside the ranks that the next batch is shared with."""

    @property
    def invitation(self) -> Invitation | None:
        """What guests need to come; None where none may."""

    def step(self, step: int, samples: int, learning_rate: float) -> None:
        """Turn everyone's gradient into new parameters; `samples` is the whole batch's."""

    def facts(self) -> dict[str, Any]:
        """What summary.json says of this exchange under `exchange`; may be empty."""

    def meet(self, samples: int, model_state: np.ndarray, ends_epoch: bool) -> int:
        """Behind a step and the model's new state: bring all ranks to the same weights and state, where that is due.

        Args:
            samples: of the step's whole batch.
            ends_epoch: it is due; everything of the exchange is then the same on every rank.

        Returns:
            Of how many samples `totals` now hold the sums, over all ranks and every step since it was last due; 0 where
            it was not, and what is collective over all ranks must wait.
        """

    def gather_state(self) -> dict[str, np.ndarray]:
        """The optimizer's arrays over the whole vector, on rank 0. Collective."""

    def showing(self, name: str) -> AbstractContextManager[None]:
        """Within the block `parameters` are this array of the optimizer's state, on every rank. Collective; no step."""

    def close(self) -> None:
        """Give everything back."""


def open_exchange(
    world: World,
    job: job_pb2.JobSpec,
    model: Model,
    resumed: Checkpoint | None,
    resume: bool,
    initial: InitialWeights | None = None,
) -> Exchange:
    """Make the exchange, attach the model to it, and fill in the weights training starts from. Collective.

    Args:
        resumed: on rank 0 the checkpoint to go on from; elsewhere None.
        resume: whether there is one, on every rank.
        initial: weights from a file, laid over those drawn by the seed.
    """
    if job.sync.WhichOneof("kind") == "parameter_server":
        # Imported here: gRPC takes a tenth of a second that an all-reduce job need not wait for.
        from worker.sync.server_opening import open_server_exchange

        return open_server_exchange(world, job, model, _without_replicas(resumed), resume, initial)
    count = model.parameter_count
    decayed = decayed_ranges(model.slots, 0, count)
    total_count = len(TOTALS) + model.sum_count
    exchange: AllReduceExchange | LocalStepsExchange
    if job.sync.WhichOneof("kind") == "local":
        exchange = LocalStepsExchange(
            *(world, job.sync.local, make_update(job), count, decayed, total_count, len(TOTALS)),
            clip_norm=job.training.clip_norm,
        )
    elif job.training.reproducible:
        exchange = ReproducibleExchange(
            *(world, make_update(job), count, decayed, total_count, job.training.clip_norm),
            shards=job.training.virtual_shards,
            shared_memory=job.sync.all_reduce.shared_memory,
        )
    else:
        exchange = AllReduceExchange(
            *(world, make_update(job), count, decayed, total_count, job.training.clip_norm),
            shared_memory=job.sync.all_reduce.shared_memory,
            wire=Wire(job.sync.all_reduce.wire_format, model.slots),
        )
    reduce = Reduction(world, exchange.node)
    model.attach(exchange.parameters, exchange.gradient, exchange.totals[len(TOTALS) :], reduce)
    lowest_of_node = exchange.node.rank == 0
    if resume:
        exact = isinstance(exchange, LocalStepsExchange) and exchange.restore_replicas(resumed.state if resumed else {})
        resumed = resumed if exact else _without_replicas(resumed)
        parameters = world.broadcast_array(resumed.parameters if resumed else None, count)
        if lowest_of_node:
            exchange.parameters[:] = parameters
        if not exact:
            for name in sorted(exchange.state):
                array = world.broadcast_array(resumed.state[name] if resumed else None, count)
                exchange.restore_state(name, array)
        if isinstance(exchange, LocalStepsExchange):
            exchange.restore_outer_state(resumed.state if resumed else {})
        else:
            exchange.restore_residuals(resumed.state if resumed else None)
    elif lowest_of_node:
        model.initialize(job.training.seed)
        if initial is not None:
            initial.load(model)
    share_state(world, model, resumed)
    exchange.publish_parameters()
    return exchange


def _without_replicas(resumed: Checkpoint | None) -> Checkpoint | None:
    return replace(resumed, state=replica_state.common(resumed.state)) if resumed else None


def share_state(world: World, model: Model, resumed: Checkpoint | None) -> None:
    """Let every rank's state be rank 0's: a checkpoint's, or what the model began with. Collective."""
    if model.state_count:
        held = model.state if resumed is None else resumed.model_state
        model.state[:] = world.broadcast_array(held if world.rank == 0 else None, model.state_count)


def check_fits(checkpoint: Checkpoint, model: Model, job: job_pb2.JobSpec) -> None:
    """Hold a checkpoint against the model and the optimizer.

    Raises:
        CheckpointFault: it belongs to another model or optimizer.
    """
    if checkpoint.layout_digest != model.layout_digest:
        raise CheckpointFault("the checkpoint is of a model with other layers or shapes; resume with the same job")
    found = 0 if checkpoint.model_state is None else checkpoint.model_state.size
    if found != model.state_count:
        raise CheckpointFault(
            f"the checkpoint has {found} running statistics and the model {model.state_count}; "
            "start anew without --resume"
        )
    needed = make_update(job).init(0, np.float32).keys()
    missing = sorted(needed - checkpoint.state.keys())
    if missing:
        raise CheckpointFault(
            f"the checkpoint lacks the optimizer's {', '.join(missing)}; resume with the same optimizer"
        )
