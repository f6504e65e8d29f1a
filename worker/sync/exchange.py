"""The gradient exchange a job asks for, behind one verb.

`step` turns every rank's gradient into the next weights. Which way it goes (shared memory and MPI, or a parameter
server) is chosen here, from `sync` in the job file, and nowhere else.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import tempfile
from pathlib import Path
from typing import Protocol

import numpy as np

from protos import environment, job_pb2
from worker.checkpoint import Checkpoint, write_checkpoint
from worker.engine.model import Model
from worker.errors import CheckpointFault
from worker.optimizers import make_optimizer
from worker.sync.all_reduce import AllReduceExchange
from worker.sync.statistics import ExchangeStatistics
from worker.sync.world import World

TOTALS = ("loss", "correct", "report")  # what rides along with the gradient


class Exchange(Protocol):
    """What the training loop knows of any exchange."""

    parameters: np.ndarray  # (parameter_count,) float32
    gradient: np.ndarray  # (parameter_count,) float32, this rank's sum
    totals: np.ndarray  # (len(TOTALS),) float64; this rank's sums before step, all ranks' after
    statistics: ExchangeStatistics
    note: str | None  # something a person should know, such as a fallback

    def step(self, step: int, samples: int, learning_rate: float) -> None:
        """Turn everyone's gradient into new parameters; `samples` is the whole batch's."""

    def gather_state(self) -> dict[str, np.ndarray]:
        """The optimizer's arrays over the whole vector, on rank 0. Collective."""

    def close(self) -> None:
        """Give everything back."""


def open_exchange(
    world: World, job: job_pb2.JobSpec, model: Model, resumed: Checkpoint | None, resume: bool
) -> Exchange:
    """Make the exchange, attach the model to it, and fill in the weights training starts from. Collective.

    Args:
        resumed: on rank 0 the checkpoint to go on from; elsewhere None.
        resume: whether there is one, on every rank.
    """
    if job.sync.WhichOneof("kind") == "parameter_server":
        return _open_parameter_server(world, job, model, resumed, resume)
    exchange = AllReduceExchange(
        world, make_optimizer(job.optimizer), model.parameter_count, decayed_ranges(model), len(TOTALS)
    )
    model.attach(exchange.parameters, exchange.gradient)
    lowest_of_node = exchange.node.rank == 0
    if resume:
        parameters = world.broadcast_array(resumed.parameters if resumed else None, model.parameter_count)
        if lowest_of_node:
            exchange.parameters[:] = parameters
        for name in sorted(exchange.state):
            array = world.broadcast_array(resumed.state[name] if resumed else None, model.parameter_count)
            exchange.restore_state(name, array)
    elif lowest_of_node:
        model.initialize(job.training.seed)
    exchange.publish_parameters()
    return exchange


def check_fits(checkpoint: Checkpoint, model: Model, job: job_pb2.JobSpec) -> None:
    """Hold a checkpoint against the model and the optimizer.

    Raises:
        CheckpointFault: it belongs to another model or optimizer.
    """
    if checkpoint.layout_digest != model.layout_digest:
        raise CheckpointFault("the checkpoint is of a model with other layers or shapes; resume with the same job")
    needed = make_optimizer(job.optimizer).init(0, np.float32).keys()
    missing = sorted(needed - checkpoint.state.keys())
    if missing:
        raise CheckpointFault(
            f"the checkpoint lacks the optimizer's {', '.join(missing)}; resume with the same optimizer"
        )


def decayed_ranges(model: Model) -> list[tuple[int, int]]:
    """The runs of the flat vector that weight decay applies to."""
    return [(slot.offset, slot.offset + int(np.prod(slot.shape))) for slot in model.slots if slot.decayed]


def _open_parameter_server(
    world: World, job: job_pb2.JobSpec, model: Model, resumed: Checkpoint | None, resume: bool
) -> Exchange:
    from worker.server.process import ServerProcess, start_server_process
    from worker.sync.parameter_server import ParameterServerExchange

    parameters = np.zeros(model.parameter_count, np.float32)
    gradient = np.zeros(model.parameter_count, np.float32)
    model.attach(parameters, gradient)
    if resume:
        parameters[:] = world.broadcast_array(resumed.parameters if resumed else None, model.parameter_count)
    else:
        model.initialize(job.training.seed)

    generation = int(os.environ.get(environment.JOB_ATTEMPT, "1"))
    token: str = world.broadcast(secrets.token_urlsafe(32) if world.rank == 0 else None)
    server: ServerProcess | None = None

    def start() -> str:
        nonlocal server
        if world.rank != 0:
            return ""
        start_from = resumed or Checkpoint(0, 0, 0, model.layout_digest, decayed_ranges(model), parameters, {})
        with tempfile.TemporaryDirectory(prefix="paceline-") as folder:
            path = Path(folder) / "start.safetensors"
            write_checkpoint(path, dataclasses.replace(start_from, decayed=decayed_ranges(model)))
            server = start_server_process(path, job, world.size, generation, token)
        return server.address

    address: str = world.broadcast(world.agree(start))
    exchange = ParameterServerExchange(
        [address], world.rank, world.size, generation, token, parameters, gradient, np.zeros(len(TOTALS)), server
    )
    world.agree(lambda: exchange.join(model.layout_digest))
    return exchange
