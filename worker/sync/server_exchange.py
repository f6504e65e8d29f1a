"""Parameter servers behind the verb of every exchange: a node is one worker, whatever its number of ranks.

A step: everyone's gradient lies in its own shared segment; fence; each rank adds up its slice over the node's segments,
in rank order; fence; each server's elements are pushed by one rank of the node, which takes the weights into the node's
only copy; fence. So what travels does not grow with the ranks of a node, and several servers are served by several
ranks. Server k is started, and kept alive, by the lowest rank of node k (modulo the nodes).

Rules: a rank's fault is told to its node behind the last fence, so that all leave together. Where the servers cut the
vector changes no bit of the result, unless a lossy wire format rounds each chunk by itself. With such a format the node
has a residual, of which each rank keeps the elements it pushes (server_wire.py), and takes whole weights at the end of
an epoch. Guests, which no mpirun has started, share the batches behind the ranks; how many they are is told to a node's
ranks through shared memory, so that all cut alike.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np

from protos import environment, job_pb2
from worker.checkpoint import STATE_PREFIX, Checkpoint
from worker.compression import kind_of
from worker.data.sharding import samples_of
from worker.engine.layers.layer import Finished
from worker.engine.model import Model
from worker.engine.params import decayed_ranges
from worker.errors import ReplicaFault, TrainingFault, UsageFault
from worker.initial_weights import InitialWeights
from worker.invitation import Invitation
from worker.server.modes import mode_of
from worker.server.process import Part
from worker.server.pushes import MOST_GUESTS
from worker.server.supervision import SupervisedServer
from worker.sync import residuals
from worker.sync.all_reduce import CACHE_LINE_ELEMENTS, leave_shared_memory, slice_bounds
from worker.sync.between_nodes import sum_in_order
from worker.sync.compression_costs import Costs, uncompressed
from worker.sync.exchange import TOTALS, share_state
from worker.sync.host_address import LOOPBACK, address_for_peers, own_addresses
from worker.sync.node import Node
from worker.sync.parameter_server import ParameterServerExchange, check_ranges
from worker.sync.reduction import Reduction
from worker.sync.reproducible import ShardBuffers, make_shard_buffers
from worker.sync.server_wire import Lossy, LossyWire
from worker.sync.statistics import ExchangeStatistics, ServerCounts
from worker.sync.world import World
from worker.update import make_update

SUM_ELEMENTS = 1 << 15  # added up at a time, so that they stay in cache
FAULT_BYTES = 2048


class ServerExchange:
    """The exchange of one rank with the servers; arrays as in Exchange."""

    finished: Finished | None = None
    guests = 0
    invitation: Invitation | None = None

    def __init__(
        self,
        world: World,
        node: Node,
        count: int,
        total_count: int,
        note: str | None,
        shard_buffers: ShardBuffers | None = None,
        at_once: bool = False,
        wire_format: job_pb2.WireFormat | None = None,
    ) -> None:
        """Collective. `use` makes it whole. With `shard_buffers`, which are what is pushed, every rank is a node.

        `at_once`: nodes go on at their own pace and meet at the end of each epoch. `wire_format`: None is float32.
        """
        self._at_once = at_once
        self.note = note
        self.shard_buffers = shard_buffers
        self.node = node
        self.statistics = ExchangeStatistics()
        self.parameters = node.shared(count, np.float32)
        self.segments = node.segments(count, np.float32)
        self.gradient = self.segments[node.rank]
        self.totals = np.zeros(total_count)
        self._total_segments = node.segments(total_count, np.float64)
        self._node_totals = node.shared(total_count, np.float64)
        self._faults = node.segments(FAULT_BYTES, np.uint8)  # UTF-8, zeros behind it
        self._counts = node.segments(3, np.int64)  # restarts, steps lost, bytes pushed
        # By rank 0 of the node, who pushes element 0: samples of the step, how many guests the next has, their numbers.
        self._next_guests = node.shared(2 + MOST_GUESTS, np.int64)
        self._seen_guests: set[int] = set()
        self._slice = slice_bounds(count, node.size)[node.rank]
        self._world = world
        self._servers: list[SupervisedServer] = []
        self.lossy = None if wire_format is None else Lossy(wire_format, node.shared(count, np.float32))
        self._costs = Costs()
        self._told = uncompressed(kind_of(wire_format)) if wire_format else {}

    def use(self, worker: ParameterServerExchange, servers: list[SupervisedServer], shard_count: int) -> None:
        """Take this rank's connections, and the servers it has started. Collective."""
        self._worker = worker
        self._world.awaits = worker.awaits
        self._servers = servers
        self._shard_count = shard_count
        self._pushed_elements = sum(len(elements) for elements, _ in worker.held)
        if isinstance(worker.wire, LossyWire):
            self._costs = Costs(worker.wire.bytes_per_second)

    @property
    def worker_arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What a rank of the node pushes and fills in: the weights, the node's gradient and its totals."""
        return self.parameters, self.segments[0], self._node_totals

    def step(self, step: int, samples: int, learning_rate: float) -> None:
        """As in Exchange; the optimizer runs in the server, so its time is part of the exchange."""
        began = perf_counter()
        if self.shard_buffers is not None:
            self.shard_buffers.add(self.totals)
        self._total_segments[self.node.rank][:] = self.totals
        self._fence()
        self._sum_up()
        self._fence()
        fault: TrainingFault | None = None
        worker = self._worker
        moved = worker.sent_bytes + worker.received_bytes
        try:
            worker.step(step, samples, learning_rate)
        except TrainingFault as found:
            fault = found
        told = self._next_guests
        if self.node.rank == 0:
            told[:2] = worker.samples, len(worker.guests)
            told[2 : 2 + len(worker.guests)] = worker.guests
        if isinstance(worker.wire, LossyWire):
            self._costs.coding_seconds = worker.wire.coding_seconds
            # Gradients out and weights in. How long it took says little of the network: it is mostly others' work.
            self._costs.sent(worker.sent_bytes + worker.received_bytes - moved, 0.0, 8 * self._pushed_elements)
        self._counts[self.node.rank][:] = worker.restarts, worker.steps_lost, worker.sent_bytes
        self._agree(fault)
        self.guests = int(told[1])
        worker.guests = tuple(told[2 : 2 + self.guests].tolist())
        self._seen_guests.update(worker.guests)
        self.totals[:] = self._node_totals
        if self._at_once:
            self.totals[TOTALS.index("report")] = 0  # ranks are not at one step, where all could report
        statistics = self.statistics
        statistics.exchange_seconds += perf_counter() - began
        statistics.sent_bytes["grpc"] = worker.sent_bytes
        statistics.received_bytes["grpc"] = worker.received_bytes
        if self._world.rank == 0:
            restarts, lost, _ = np.sum(self._counts, axis=0).tolist()
            statistics.servers = ServerCounts(restarts, lost, worker.workers + self.guests)

    def facts(self) -> dict[str, Any]:
        """As in Exchange: how many servers there were, what their deaths cost and what rank 0's node pushed.

        Of a lossy wire format, what the rank with the slowest way to its servers and they sent each other, up to the
        last epoch's end: pushes, answers and whole weights.
        """
        restarts, lost, pushed = np.sum(self._counts, axis=0).tolist()
        facts: dict[str, Any] = {
            "servers": self._shard_count, "shard_restarts": restarts, "steps_lost": lost, "node_pushed_bytes": pushed
        }  # fmt: skip
        if self.invitation:
            facts["guests"] = len(self._seen_guests)
        if self._at_once:
            stale = self._worker.staleness
            mean = stale.total_steps / stale.pushes if stale.pushes else 0.0
            facts |= {"mean_staleness_steps": round(mean, 3), "most_staleness_steps": round(stale.most_steps, 3)}
        return facts | self._told

    def meet(self, samples: int, model_state: np.ndarray, ends_epoch: bool) -> int:
        """As in Exchange: all ranks met in the step, in which a guest's samples may be missing.

        Where nodes go at their own pace, they meet at the epoch's end. With a lossy wire format that is where everybody
        takes whole weights.
        """
        if ends_epoch and self._at_once:
            self._world.agree(lambda: None)  # everybody's pushes are applied
        if ends_epoch and (self._at_once or self.lossy):
            began, size = perf_counter(), self.parameters.nbytes
            self._pull_into_node("parameters", state=False, publish=True)
            if self.node.rank == 0:
                self._costs.sent(size, perf_counter() - began, 0)
            self._tell_costs()
        if ends_epoch and self._at_once:
            if len(model_state):
                held = model_state if self._world.rank == 0 else None
                model_state[:] = self._world.broadcast_array(held, len(model_state))
            self._world.comm.Bcast(self.totals, root=0)  # what is decided by them is decided by all alike
        return samples if self._at_once else int(self._next_guests[0])

    def gather_state(self) -> dict[str, np.ndarray]:
        """As in Exchange: rank 0 asks the servers, and every node for what it has yet to send."""
        unsent = residuals.gather(self._world, self._residual, self.parameters.size) if self.lossy else {}
        arrays, fault = {}, None
        if self._world.rank == 0:
            try:
                arrays = self._worker.pull(state=True)
            except TrainingFault as found:
                fault = found
        told = self._world.broadcast(str(fault) if fault else None)
        if told:
            raise TrainingFault(told) from fault
        return unsent | {
            name.removeprefix(STATE_PREFIX): array for name, array in arrays.items() if name.startswith(STATE_PREFIX)
        }

    def restore_residuals(self, state: dict[str, np.ndarray] | None, worker: int, workers: int) -> None:
        """Take this node's part of what a checkpoint (on rank 0) says was yet to be sent. Collective.

        Args:
            worker: the node's number among the `workers`.
        """
        if self.lossy:
            self._residual = residuals.NodeResidual(worker, workers, self.lossy.residual, self.node.rank == 0)
            residuals.restore(self._world, self._residual, self.parameters.size, state)
            self.node.fence()
        elif residuals.is_any(self._world, state):
            self.note = "\n".join(filter(None, (self.note, residuals.LOST)))

    @contextmanager
    def showing(self, name: str) -> Iterator[None]:
        """As in Exchange: the lowest rank of each node asks the servers."""
        lowest = self.node.rank == 0
        own = self.parameters.copy() if lowest else np.empty(0, np.float32)
        self._pull_into_node(STATE_PREFIX + name, state=True)
        yield
        self.node.fence()
        if lowest:
            self.parameters[:] = own
        self.node.fence()

    def close(self) -> None:
        """Leave, then end the servers once everybody has."""
        self._worker.leave()
        self._world.agree(lambda: None)
        for server in self._servers:
            server.stop()
        self.node.close()

    def _tell_costs(self) -> None:
        """Let rank 0 know what the wire format cost and saved where the network is slowest. Collective."""
        if self.lossy:
            everyone = self._world.gather_everywhere(self._costs.facts(kind_of(self.lossy.wire_format)))
            pushing = [facts for facts in everyone if facts["float32_bytes"]]
            self._told = min(pushing, key=lambda facts: facts["bytes_per_second"])

    def _pull_into_node(self, name: str, state: bool, publish: bool = False) -> None:
        """Let the node's `parameters` be an array that the servers hold."""
        fault = None
        if self.node.rank == 0:
            try:
                self.parameters[:] = self._worker.pull(state=state, publish=publish)[name]
            except TrainingFault as found:
                fault = found
        self._agree(fault)

    def _sum_up(self) -> None:
        """Add up this rank's slice over the node's gradients, into that of its lowest rank."""
        node = self.node
        if node.rank == 0:
            self._node_totals[:] = self._total_segments[0]
            for totals in self._total_segments[1:]:
                self._node_totals += totals
        if node.size == 1:
            return
        start, stop = self._slice
        for low in range(start, stop, SUM_ELEMENTS):
            high = min(low + SUM_ELEMENTS, stop)
            parts = [segment[low:high] for segment in self.segments]
            sum_in_order(parts, parts[0])
        own_bytes = 4 * (stop - start)
        self.statistics.received("shared_memory", own_bytes * (node.size - 1))
        self.statistics.sent("shared_memory", self.gradient.nbytes - own_bytes)

    def _agree(self, fault: TrainingFault | None) -> None:
        """Fence, behind which a fault of any rank of the node is raised on each of them."""
        if fault is not None:
            text = np.frombuffer(str(fault).encode()[:FAULT_BYTES], np.uint8)
            self._faults[self.node.rank][: len(text)] = text
        self._fence()
        for told in self._faults:
            if told[0]:
                kind = (
                    ReplicaFault if self._at_once else TrainingFault
                )  # nodes at their own pace do not see it together
                raise kind(told.tobytes().rstrip(b"\0").decode(errors="replace")) from fault

    def _fence(self) -> None:
        began = perf_counter()
        self.node.fence()
        self.statistics.wait_seconds += perf_counter() - began


def shard_parts(count: int, servers: int) -> list[tuple[int, int]]:
    """The (start, stop) of each shard, cut on cache lines; fewer shards than asked for where one would be empty."""
    return slice_bounds(count, min(servers, -(-count // CACHE_LINE_ELEMENTS)))


def open_server_exchange(
    world: World,
    job: job_pb2.JobSpec,
    model: Model,
    resumed: Checkpoint | None,
    resume: bool,
    initial: InitialWeights | None,
) -> ServerExchange:
    """As `open_exchange`. Collective."""
    count, total_count = model.parameter_count, len(TOTALS) + model.sum_count
    asked = job.sync.parameter_server.servers
    parts = shard_parts(count, asked)
    optimizer = make_update(job)
    world.agree(lambda: _check_one_shard(len(parts), job, optimizer.direct is not None))
    buffers, at_once = None, mode_of(job.sync.parameter_server).at_once
    if at_once and world.node_comm.Get_size() == world.size:
        world.split_nodes_into_ranks()  # a machine alone has no other node to be ahead of
    if job.training.reproducible:  # what each rank computes is added up by the servers alone, in the tree's order
        world.split_nodes_into_ranks()
        buffers = make_shard_buffers(world, job.training.virtual_shards, count, total_count)
    wire_format = job.sync.parameter_server.wire_format
    lossy = kind_of(wire_format) != "float32"
    unshared = leave_shared_memory(world, True, count, total_count, 4 * count if lossy else 0)
    node = Node(world)
    lines = [unshared] if unshared else []
    if lossy:
        kind = kind_of(wire_format)
        lines.append(f"gradients and weights travel as {kind}, and what that loses with the next step's")
    if len(parts) < asked:
        lines.append(f"{len(parts)} parameter servers instead of {asked}: the model has {count} parameters")
    exchange = ServerExchange(
        *(world, node, count, total_count, "\n".join(lines) or None, buffers, at_once),
        wire_format=wire_format if lossy else None,
    )
    reduce = Reduction(world, node)
    model.attach(exchange.parameters, exchange.gradient, exchange.totals[len(TOTALS) :], reduce)
    if resume:
        parameters = world.broadcast_array(resumed.parameters if resumed else None, count)
        if node.rank == 0:
            exchange.parameters[:] = parameters
    elif node.rank == 0:
        model.initialize(job.training.seed)
        if initial is not None:
            initial.load(model)
    share_state(world, model, resumed)
    node.fence()

    lowest = [rank for rank, local in enumerate(world.gather_everywhere(node.rank)) if local == 0]
    placed = [lowest[index % len(lowest)] for index in range(len(parts))]
    mine = [index for index, rank in enumerate(placed) if rank == world.rank]
    state = {
        name: world.broadcast_array(resumed.state[name] if resumed else None, count)
        for name in sorted(optimizer.init(0, np.float32))
    } if resume else {}  # fmt: skip
    step: int = world.broadcast(resumed.step if resumed else 0)
    host = address_for_peers(world)
    if job.sync.parameter_server.guests and host == LOOPBACK:
        host = next(iter(own_addresses()), LOOPBACK)
    generation = int(os.environ.get(environment.JOB_ATTEMPT, "1"))
    token: str = world.broadcast(secrets.token_urlsafe(32) if world.rank == 0 else None)
    decayed = decayed_ranges(model.slots, 0, count)

    def start(index: int) -> SupervisedServer:
        first, stop = parts[index]
        own = Checkpoint(
            *(step, 0, 0, model.layout_digest, decayed, exchange.parameters[first:stop]),
            state={name: array[first:stop] for name, array in state.items()},
        )
        return SupervisedServer(job, own, Part(first, count), len(lowest), generation, token, host)

    servers = world.agree(lambda: [start(index) for index in mine])
    addresses = [""] * len(parts)
    for rank, started in enumerate(world.gather_everywhere([server.address for server in servers])):
        for index, address in zip((i for i, placed_on in enumerate(placed) if placed_on == rank), started, strict=True):
            addresses[index] = address
    number: int = node.comm.bcast(sum(rank <= world.rank for rank in lowest) - 1, root=0)
    exchange.restore_residuals(resumed.state if resumed else None, number, len(lowest))
    ranks: list[int] = node.comm.allgather(world.rank)
    worker = ParameterServerExchange(
        addresses, number, len(lowest), generation, token, model.layout_digest,
        *exchange.worker_arrays, timeout_seconds=1.5 * job.limits.stall_seconds,
        pushes_to=range(node.rank, len(parts), node.size), return_seconds=0.5 * job.limits.stall_seconds,
        pushed=buffers.pushed() if buffers else None,
        share_of=lambda samples, guests: samples_of(ranks, samples, world.size + guests), ranks=world.size,
        lossy=exchange.lossy,
    )  # fmt: skip
    world.agree(worker.join)
    held = [(range(*bounds), address) for part in node.comm.allgather(_plain(worker)) for bounds, address in part]
    world.agree(lambda: check_ranges(held, count))
    exchange.use(worker, servers, len(parts))
    if job.sync.parameter_server.guests:
        exchange.invitation = Invitation(addresses[0], token)
    return exchange


def _plain(worker: ParameterServerExchange) -> list[tuple[tuple[int, int], str]]:
    return [((elements.start, elements.stop), address) for elements, address in worker.held]


def _check_one_shard(shards: int, job: job_pb2.JobSpec, has_trust_ratios: bool) -> None:
    if shards == 1:
        return
    for used, what in (
        (bool(job.training.clip_norm), "training.clip_norm"),
        (has_trust_ratios, f"optimizer {job.optimizer.WhichOneof('kind')}"),
    ):
        if used:
            raise UsageFault(
                f"sync.parameter_server.servers: {job.sync.parameter_server.servers} beside {what}, which needs the "
                "whole gradient in one place: take 1 server, or sync: all_reduce"
            )
