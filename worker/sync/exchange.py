"""The gradient exchange a job asks for, behind one verb.

`step` turns every rank's gradient into the next weights. Which way it goes (shared memory and MPI, or a parameter
server, or replicas that meet now and then) is chosen here, from `sync` in the job file, and nowhere else.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from protos import environment, job_pb2
from protos.job_file import to_yaml
from worker.checkpoint import STATE_PREFIX, Checkpoint, write_checkpoint
from worker.engine.layers.layer import Finished
from worker.engine.model import Model
from worker.engine.params import decayed_ranges
from worker.errors import CheckpointFault
from worker.initial_weights import InitialWeights
from worker.sync.all_reduce import AllReduceExchange
from worker.sync.local_steps import LocalStepsExchange
from worker.sync.reduction import Reduction
from worker.sync.statistics import ExchangeStatistics
from worker.sync.world import World
from worker.update import make_update

if TYPE_CHECKING:
    from worker.sync.parameter_server import ParameterServerExchange

TOTALS = ("loss", "correct", "report")  # what rides along with the gradient


class Vectors(NamedTuple):
    """The arrays a rank computes with."""

    parameters: np.ndarray  # (parameter_count,) float32
    gradient: np.ndarray  # (parameter_count,) float32
    totals: np.ndarray  # (len(TOTALS) + model.sum_count,) float64


class Exchange(Protocol):
    """What the training loop knows of any exchange."""

    parameters: np.ndarray  # (parameter_count,) float32
    gradient: np.ndarray  # (parameter_count,) float32, this rank's sum
    # TOTALS, then the sums of layers with state: this rank's before step, all ranks' after.
    totals: np.ndarray  # (len(TOTALS) + model.sum_count,) float64
    statistics: ExchangeStatistics
    note: str | None  # lines a person should know, such as a fallback
    finished: Finished | None  # to be told while backward runs from which element on `gradient` is finished

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
        return _open_parameter_server(world, job, model, resumed, resume, initial)
    count = model.parameter_count
    decayed = decayed_ranges(model.slots, 0, count)
    total_count = len(TOTALS) + model.sum_count
    exchange: AllReduceExchange | LocalStepsExchange
    if job.sync.WhichOneof("kind") == "local":
        exchange = LocalStepsExchange(
            *(world, job.sync.local, make_update(job), count, decayed, total_count, len(TOTALS)),
            clip_norm=job.training.clip_norm,
        )
    else:
        exchange = AllReduceExchange(
            *(world, make_update(job), count, decayed, total_count, job.training.clip_norm),
            shared_memory=job.sync.all_reduce.shared_memory,
        )
    reduce = Reduction(world, exchange.node)
    model.attach(exchange.parameters, exchange.gradient, exchange.totals[len(TOTALS) :], reduce)
    lowest_of_node = exchange.node.rank == 0
    if resume:
        parameters = world.broadcast_array(resumed.parameters if resumed else None, count)
        if lowest_of_node:
            exchange.parameters[:] = parameters
        for name in sorted(exchange.state):
            array = world.broadcast_array(resumed.state[name] if resumed else None, count)
            exchange.restore_state(name, array)
        if isinstance(exchange, LocalStepsExchange):
            exchange.restore_outer_state(resumed.state if resumed else {})
    elif lowest_of_node:
        model.initialize(job.training.seed)
        if initial is not None:
            initial.load(model)
    _share_state(world, model, resumed)
    exchange.publish_parameters()
    return exchange


def _share_state(world: World, model: Model, resumed: Checkpoint | None) -> None:
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


class ServerExchange:
    """A parameter server's worker seen as an Exchange: every rank is on its own, rank 0 owns the server process."""

    note: str | None = None
    finished: Finished | None = None

    def __init__(
        self, world: World, worker: ParameterServerExchange, model_vectors: Vectors, server: Any, at_once: bool
    ) -> None:
        self.parameters, self.gradient, self.totals = model_vectors
        self.statistics = ExchangeStatistics()
        self._world = world
        self._worker = worker
        self._server = server
        self._at_once = at_once  # each rank goes on at its own pace

    def step(self, step: int, samples: int, learning_rate: float) -> None:
        """As in Exchange; the optimizer runs in the server, so its time is part of the exchange."""
        began = perf_counter()
        self._worker.step(step, samples, learning_rate)
        if self._at_once:
            self.totals[TOTALS.index("report")] = 0  # ranks are not at one step, where all could report
        statistics = self.statistics
        statistics.exchange_seconds += perf_counter() - began
        statistics.wait_seconds = self._worker.wait_seconds
        statistics.sent_bytes["grpc"] = self._worker.sent_bytes
        statistics.received_bytes["grpc"] = self._worker.received_bytes

    def facts(self) -> dict[str, Any]:
        """As in Exchange: none."""
        return {}

    def meet(self, samples: int, model_state: np.ndarray, ends_epoch: bool) -> int:
        """As in Exchange: all ranks met in the step; where they go at their own pace, they meet at the epoch's end."""
        if self._at_once and ends_epoch:
            self._world.agree(lambda: None)  # everybody's pushes are applied
            self.parameters[:] = self._world.agree(lambda: self._worker.pull(state=False)["parameters"])
            if len(model_state):
                held = model_state if self._world.rank == 0 else None
                model_state[:] = self._world.broadcast_array(held, len(model_state))
        return samples

    def gather_state(self) -> dict[str, np.ndarray]:
        """As in Exchange: rank 0 asks the server."""
        if self._world.rank != 0:
            return {}
        arrays = self._worker.pull(state=True)
        return {
            name.removeprefix(STATE_PREFIX): array for name, array in arrays.items() if name.startswith(STATE_PREFIX)
        }

    @contextmanager
    def showing(self, name: str) -> Iterator[None]:
        """As in Exchange: every rank asks the server."""
        own = self.parameters.copy()
        self.parameters[:] = self._worker.pull(state=True)[STATE_PREFIX + name]
        yield
        self.parameters[:] = own

    def close(self) -> None:
        """Leave, then end the server once everybody has."""
        self._worker.leave()
        self._world.agree(lambda: None)
        if self._server is not None:
            self._server.stop()


def _open_parameter_server(
    world: World,
    job: job_pb2.JobSpec,
    model: Model,
    resumed: Checkpoint | None,
    resume: bool,
    initial: InitialWeights | None = None,
) -> ServerExchange:
    # Imported here: gRPC takes a tenth of a second that an all-reduce job need not wait for.
    from worker.server.modes import mode_of
    from worker.server.process import start_server_process
    from worker.sync.parameter_server import ParameterServerExchange

    count = model.parameter_count
    vectors = Vectors(np.zeros(count, np.float32), np.zeros(count, np.float32), np.zeros(len(TOTALS) + model.sum_count))
    model.attach(vectors.parameters, vectors.gradient, vectors.totals[len(TOTALS) :], world.sum)
    if resume:
        vectors.parameters[:] = world.broadcast_array(resumed.parameters if resumed else None, count)
    else:
        model.initialize(job.training.seed)
        if initial is not None:
            initial.load(model)
    _share_state(world, model, resumed)

    generation = int(os.environ.get(environment.JOB_ATTEMPT, "1"))
    token: str = world.broadcast(secrets.token_urlsafe(32) if world.rank == 0 else None)

    def start() -> Any:
        if world.rank != 0:
            return None
        start_from = resumed or Checkpoint(
            *(0, 0, 0),
            layout_digest=model.layout_digest,
            decayed=decayed_ranges(model.slots, 0, count),
            parameters=vectors.parameters,
            state={},
        )
        with tempfile.TemporaryDirectory(prefix="paceline-") as folder:
            job_file, start_file = Path(folder) / "job.yaml", Path(folder) / "start.safetensors"
            job_file.write_text(to_yaml(job))
            write_checkpoint(start_file, start_from)
            return start_server_process(job_file, start_file, world.size, generation, token)

    server = world.agree(start)
    address: str = world.broadcast(server.address if server else None)
    worker = ParameterServerExchange(
        [address], world.rank, world.size, generation, token, model.layout_digest, *vectors,
        timeout_seconds=1.5 * job.limits.stall_seconds,
    )  # fmt: skip
    world.agree(worker.join)
    return ServerExchange(world, worker, vectors, server, mode_of(job.sync.parameter_server).at_once)
