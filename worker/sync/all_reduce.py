"""All-reduce with the optimizer sharded over the node's ranks.

The flat vector is cut into one slice for each local rank. A step: everyone's gradient lies in its own shared segment;
fence; each rank adds up its slice over the node's segments, in rank order, exchanges it with its peers on other nodes
(buckets.py, which begins while backward runs), runs the optimizer on it and writes the node's only copy of the weights;
fence. Optimizer state exists once per node.

Rules: sums, not means, travel; the divisor is the global sample count, so uneven shares are exact. On nodes with
unequal numbers of ranks there are as many slices as the smallest node has ranks. Clipping by global norm costs one more
fence, behind which each rank reads one number of every other rank of its node; so do an optimizer's trust ratios, with
two numbers for each tensor.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from worker.clipping import norm_factor, sum_of_squares
from worker.engine.layers.layer import Finished
from worker.optimizers import CHUNK_ELEMENTS, Optimizer
from worker.sync import residuals
from worker.sync.between_nodes import BetweenNodes, Slice, sum_in_order
from worker.sync.buckets import Buckets
from worker.sync.compressed_reduction import CompressedSlice, Wire
from worker.sync.compression_costs import uncompressed
from worker.sync.node import Node, shared_memory_shortage
from worker.sync.statistics import ExchangeStatistics
from worker.sync.world import World
from worker.trust_ratio import add_square_sums, tensors_within, trust_ratios
from worker.trust_ratio import scale as scale_by_ratios

if TYPE_CHECKING:
    from worker.sync.reproducible import ShardBuffers

WINDOWS_BYTES = 1 << 19  # for each rank, beside what its windows hold: their last pages, and MPI's own
CACHE_LINE_ELEMENTS = 16  # slices begin on cache lines: two ranks never write the same one


class Chunk(NamedTuple):
    """A piece of this rank's slice that stays in cache, with every view the step needs, made once."""

    parameters: np.ndarray
    gradients: list[np.ndarray]  # one view into each local rank's segment
    total: np.ndarray  # where their sum goes
    state: dict[str, np.ndarray]
    decayed: list[tuple[int, int]]
    tensors: slice  # which of the vector's decayed tensors these are parts of


class AllReduceExchange:
    """The gradient exchange of one rank. Collective: every rank makes one, with the same arguments.

    Attributes:
        parameters: (parameter_count,) float32, the node's one copy of the weights.
        gradient: (parameter_count,) float32, this rank's own.
        totals: (total_count,) float64; a rank's sums before `step`, the sums over all ranks after it.
        finished: where several nodes exchange early, what backward is to tell how far it has come.
        note: lines a person should know, such as why shared memory is not used.
    """

    in_step = True
    first_loss: float | None = None
    shard_buffers: ShardBuffers | None = None
    guests = 0
    invitation = None

    def __init__(
        self,
        world: World,
        optimizer: Optimizer,
        parameter_count: int,
        decayed: list[tuple[int, int]],
        total_count: int,
        clip_norm: float = 0.0,
        shared_memory: bool = True,
        overlap: bool = True,
        wire: Wire | None = None,
    ) -> None:
        """`shared_memory`: off makes every rank its own node. `overlap`: the exchange may begin before `step`.

        `wire`: how gradients travel between nodes; None is float32.
        """
        unshared = leave_shared_memory(world, shared_memory, parameter_count, total_count + 2 * len(decayed))
        self.node = node = Node(world)
        self.statistics = ExchangeStatistics()
        self._world = world
        self._optimizer = optimizer
        self.parameters = node.shared(parameter_count, np.float32)
        segments = node.segments(parameter_count, np.float32)
        self._segments = segments
        self.gradient = segments[node.rank]
        self._total_segments = node.segments(total_count, np.float64)
        self._node_totals = node.shared(total_count, np.float64)
        self.totals = np.zeros(total_count)

        slices = min(world.gather_everywhere(node.size))
        owns_slice = node.rank < slices
        self.bounds = slice_bounds(parameter_count, slices)[node.rank] if owns_slice else (0, 0)
        start, stop = self.bounds
        self._peers = world.comm.Split(node.rank if owns_slice else slices, world.rank)
        several_nodes = node.size < world.size
        self.state = optimizer.init(stop - start, np.float32)
        self._clip_norm = clip_norm
        self._square_sums = node.segments(1, np.float64)
        tensors = len(decayed) if optimizer.direct else 0
        self._tensor_sums = [segment.reshape(tensors, 2) for segment in node.segments(2 * tensors, np.float64)]
        # Where the whole slice must be summed before any of it is used.
        self._sums_first = several_nodes or clip_norm > 0 or optimizer.direct is not None
        self._slice_total = np.zeros(stop - start if self._sums_first else 0, np.float32)
        self._wire = wire if wire is not None and wire.lossy else None
        self._between_nodes: BetweenNodes | None = None
        self._compressed: CompressedSlice | None = None
        self._carried: np.ndarray | None = None  # of a resumed run's slice, what joins the mean of the first step
        if several_nodes:
            own = Slice(start, [segment[start:stop] for segment in segments], self._slice_total, self._peers)
            largest = max(high - low for low, high in slice_bounds(parameter_count, slices))
            if self._wire:
                self._between_nodes = self._compressed = CompressedSlice(
                    own, owns_slice, slices, self._wire, self.statistics
                )
            else:
                self._between_nodes = Buckets(world, node, own, parameter_count, largest, self.statistics, overlap)
        self.finished: Finished | None = self._between_nodes.finished if self._between_nodes else None
        lines = [unshared] if unshared else []
        lines += self._between_nodes.lines if self._between_nodes else []
        self.note = "\n".join(lines) or None
        self._chunks = self._cut(segments, start, stop, decayed)
        node.fence()

    def step(self, step: int, samples: int, learning_rate: float) -> None:
        """Turn everyone's `gradient` into new `parameters`.

        Args:
            step: from 1.
            samples: of the whole batch, over all ranks.
        """
        node, statistics = self.node, self.statistics
        began = perf_counter()
        if self._carried is not None:
            self.gradient[slice(*self.bounds)] += np.float32(samples) * self._carried
            self._carried = None
        self._total_segments[node.rank][:] = self.totals
        node.fence()
        arrived = perf_counter()
        statistics.wait_seconds += arrived - began

        totals_exchanged = self._exchange_totals()
        scale = np.float32(1.0 / samples)
        update = self._optimizer.update
        reducing, updating = 0.0, 0.0
        if self._between_nodes:
            self._between_nodes.finish(samples)
        elif self._sums_first:
            for chunk in self._chunks:
                _sum(chunk)
        if totals_exchanged is not None:
            totals_exchanged.Wait()
        if self._clip_norm:
            scale *= np.float32(norm_factor(self._square_sum() / samples**2, self._clip_norm))
        before = perf_counter()
        ratios = None
        self._world.beat.phase("update")
        if self._optimizer.direct:
            self._direct(step, scale)
            updating += perf_counter() - before
            ratios = self._trust_ratios()
            before = perf_counter()
        for chunk in self._chunks:
            if ratios is not None:
                scale_by_ratios(chunk.total, chunk.decayed, ratios[chunk.tensors])
            else:
                if not self._sums_first:
                    _sum(chunk)
                np.multiply(chunk.total, scale, out=chunk.total)
            reduced = perf_counter()
            update(chunk.parameters, chunk.total, chunk.state, step, learning_rate, chunk.decayed)
            after = perf_counter()
            reducing += reduced - before
            updating += after - reduced
            before = after
        worked = perf_counter()
        self._world.beat.phase("publish")
        node.fence()
        left = perf_counter()
        statistics.wait_seconds += left - worked
        statistics.exchange_seconds += left - began - updating
        statistics.update_seconds += updating
        if node.size > 1:
            # We read the other ranks' gradients in our slice; they read ours outside it.
            own_bytes = 4 * (self.bounds[1] - self.bounds[0])
            statistics.received("shared_memory", own_bytes * (node.size - 1))
            statistics.sent("shared_memory", self.gradient.nbytes - own_bytes)
        self.totals[:] = self._node_totals

    def facts(self) -> dict[str, Any]:
        """As in Exchange: of the exchange between nodes, where there are several."""
        if self._between_nodes:
            return self._between_nodes.facts()
        return uncompressed(self._wire.kind) if self._wire else {}

    def meet(self, samples: int, model_state: np.ndarray, ends_epoch: bool) -> int:
        """As in Exchange: all ranks met in the step."""
        return samples

    def gather_state(self) -> dict[str, np.ndarray]:
        """The optimizer's state over the whole vector, on rank 0 (elsewhere empty arrays). Collective.

        Valid until the next step: one rank alone gives its own arrays, and several gather into the memory of the
        node's gradients, which hold nothing between steps, as far as that reaches.
        """
        whole = residuals.gather(self._world, self._compressed, self.parameters.size) if self._compressed else {}
        if self.node.size == 1:
            return dict(sorted(self.state.items())) | whole
        room = itertools.chain(self._segments, itertools.repeat(None))
        for (name, own), segment in zip(sorted(self.state.items()), room, strict=False):
            counts = self.node.comm.allgather(int(own.size))
            everything = np.empty(0, own.dtype)
            if self.node.rank == 0:
                everything = np.empty_like(self.parameters) if segment is None else segment
            self.node.comm.Gatherv(own, (everything, counts) if self.node.rank == 0 else None, root=0)
            whole[name] = everything
        return whole

    def restore_state(self, name: str, whole: np.ndarray) -> None:
        """Take this rank's slice of one array of a checkpoint."""
        start, stop = self.bounds
        self.state[name][:] = whole[start:stop]

    def restore_residuals(self, state: dict[str, np.ndarray] | None) -> None:
        """Take this rank's part of what a checkpoint (on rank 0) says was yet to be sent. Collective."""
        if self._compressed:
            residuals.restore(self._world, self._compressed, self.parameters.size, state)
            return
        self._carried = residuals.restore_sum(self._world, self.bounds, self.parameters.size, state)
        if self._carried is not None and self._between_nodes:  # whose buckets may have set out before `step`
            self._carried = None
            self.note = "\n".join(filter(None, (self.note, residuals.LOST)))

    @contextmanager
    def showing(self, name: str) -> Iterator[None]:
        """Within the block `parameters` are this array of the state, on every rank. Collective; no step.

        What ends the block by a fault ends the run: the weights are then not put back, since that is a wait for others.
        """
        here = slice(*self.bounds)
        own = self.parameters[here].copy()
        self.parameters[here] = self.state[name]
        self.node.fence()
        yield
        self.node.fence()
        self.parameters[here] = own
        self.node.fence()

    def publish_parameters(self) -> None:
        """After the lowest rank of each node has written `parameters`: let every rank of the node see them."""
        self.node.fence()

    def close(self) -> None:
        """Give the shared memory back; `parameters` and `gradient` end with it."""
        self.node.close()

    def _square_sum(self) -> float:
        """Over the whole summed gradient: each rank of the node knows its slice, and together they know all."""
        own = math.fsum(sum_of_squares(chunk.total) for chunk in self._chunks)
        self._square_sums[self.node.rank][0] = own
        began = perf_counter()
        self.node.fence()
        self.statistics.wait_seconds += perf_counter() - began
        return math.fsum(float(part[0]) for part in self._square_sums)

    def _direct(self, step: int, scale: np.float32) -> None:
        """Turn the slice's summed gradient into the step's direction, and leave its sums for the node to read."""
        assert self._optimizer.direct is not None
        sums = self._tensor_sums[self.node.rank]
        sums[:] = 0
        for chunk in self._chunks:
            np.multiply(chunk.total, scale, out=chunk.total)
            self._optimizer.direct(chunk.parameters, chunk.total, chunk.state, step, chunk.decayed)
            add_square_sums(sums[chunk.tensors], chunk.parameters, chunk.total, chunk.decayed)

    def _trust_ratios(self) -> np.ndarray:
        """Of every decayed tensor: the slices of one node are the whole vector, so no other node need be asked."""
        began = perf_counter()
        self.node.fence()
        self.statistics.wait_seconds += perf_counter() - began
        return trust_ratios(np.sum(self._tensor_sums, axis=0))

    def _exchange_totals(self) -> Any:
        """Start it; the request to wait for, or None."""
        node = self.node
        if node.rank != 0:
            return None
        self._node_totals[:] = self._total_segments[0]
        for segment in self._total_segments[1:]:
            self._node_totals += segment
        if not self._between_nodes:
            return None
        from mpi4py import MPI

        return self._peers.Iallreduce(MPI.IN_PLACE, self._node_totals, op=MPI.SUM)

    def _cut(self, segments: list[np.ndarray], start: int, stop: int, decayed: list[tuple[int, int]]) -> list[Chunk]:
        # One rank alone sums nothing: its gradient is the total, and may be overwritten.
        alone = len(segments) == 1 and self._between_nodes is None
        scratch = np.empty(min(CHUNK_ELEMENTS, stop - start), np.float32)
        chunks = []
        for low in range(start, stop, CHUNK_ELEMENTS):
            high = min(low + CHUNK_ELEMENTS, stop)
            gradients = [segment[low:high] for segment in segments]
            if alone:
                total = gradients[0]
            elif self._sums_first:
                total = self._slice_total[low - start : high - start]
            else:
                total = scratch[: high - low]
            chunks.append(
                Chunk(
                    self.parameters[low:high],
                    [] if alone else gradients,
                    total,
                    {name: array[low - start : high - start] for name, array in self.state.items()},
                    [(max(a, low) - low, min(b, high) - low) for a, b in decayed if a < high and b > low],
                    tensors_within(decayed, low, high),
                )
            )
        return chunks


def slice_bounds(elements: int, slices: int) -> list[tuple[int, int]]:
    """Cut `elements` into `slices` runs of nearly equal length that begin on cache lines; late ones may be empty."""
    lines = -(-elements // CACHE_LINE_ELEMENTS)
    edges = [min(elements, lines * index // slices * CACHE_LINE_ELEMENTS) for index in range(slices + 1)]
    return list(itertools.pairwise(edges))


def _sum(chunk: Chunk) -> None:
    if chunk.gradients:
        sum_in_order(chunk.gradients, chunk.total)


def leave_shared_memory(
    world: World, wanted: bool, parameter_count: int, sum_count: int, more_bytes: int = 0
) -> str | None:
    """Make every rank its own node where that is asked for, or the windows would not fit; returns a line that says why.

    Args:
        sum_count: float64 sums of one rank that lie in windows too.
        more_bytes: of what else the node holds once.
    """
    local_ranks = world.node_comm.Get_size()
    if not wanted:
        reason = "sync.all_reduce.shared_memory is off"
    else:
        needed = (4 * parameter_count + 8 * sum_count) * (local_ranks + 1) + local_ranks * WINDOWS_BYTES + more_bytes
        shortage = shared_memory_shortage(needed) if local_ranks > 1 else None
        found = [f"{host}: {why}" for host, why in world.gather_everywhere([world.host, shortage]) if why]
        if not found:
            return None
        reason = found[0]
    world.split_nodes_into_ranks()
    return f"shared memory is not used: {reason}; every rank is its own node"
