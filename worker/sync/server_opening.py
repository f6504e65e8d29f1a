"""How a job comes to its parameter servers: where the vector is cut, who starts which server, who pushes to it.

Rules: collective; what one rank cannot do ends all with its words.
"""

from __future__ import annotations

import os
import secrets

import numpy as np

from protos import environment, job_pb2
from worker.checkpoint import Checkpoint
from worker.compression import kind_of
from worker.data.sharding import samples_of
from worker.engine.model import Model
from worker.engine.params import decayed_ranges
from worker.errors import UsageFault
from worker.initial_weights import InitialWeights
from worker.invitation import Invitation
from worker.server.modes import mode_of
from worker.server.process import Part
from worker.server.supervision import SupervisedServer
from worker.sync.all_reduce import CACHE_LINE_ELEMENTS, leave_shared_memory, slice_bounds
from worker.sync.exchange import TOTALS, share_state
from worker.sync.exchange_stream import check_ranges
from worker.sync.host_address import LOOPBACK, address_for_peers, own_addresses
from worker.sync.node import Node
from worker.sync.parameter_server import ParameterServerExchange
from worker.sync.reduction import Reduction
from worker.sync.reproducible import make_shard_buffers
from worker.sync.server_exchange import ServerExchange
from worker.sync.world import World
from worker.update import make_update, whole_gradient_user


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
    world.agree(lambda: _check_one_shard(len(parts), job))
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


def _check_one_shard(shards: int, job: job_pb2.JobSpec) -> None:
    if shards > 1 and (user := whole_gradient_user(job)) is not None:
        raise UsageFault(
            f"sync.parameter_server.servers: {job.sync.parameter_server.servers} beside {user}, which needs the "
            "whole gradient in one place: take 1 server, or sync: all_reduce"
        )
