"""The all-reduce whose result has the same bits on every number of ranks and nodes.

What travels is not a rank's sum but those of its maximal subtrees of virtual shards (reduction_tree.py). A step:
everyone's subtrees lie in its own shared segment; fence; each rank merges the siblings among the node's subtrees within
its slice, gathers from its peers on other nodes what theirs came to, merges again, which leaves the whole batch's sum,
and runs the optimizer on it; fence.

Rules: an operation whose result depends on where a slice ends, or on who adds first, is not used: gradients are
merged in the tree, totals in the order of the shards, squares by exact_sums.py. The arithmetic is that of the
parameter server's shard, which comes to the same bits.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from time import perf_counter
from typing import NamedTuple

import numpy as np

from worker.clipping import norm_factor
from worker.exact_sums import block_bounds, exact_totals, pieces, square_sums
from worker.optimizers import CHUNK_ELEMENTS, Optimizer, Ranges
from worker.sync import residuals
from worker.sync.all_reduce import AllReduceExchange, leave_shared_memory
from worker.sync.node import Node
from worker.sync.reduction_tree import Folding, Subtree, fold, merge, most_slots, own_shards, shard_totals
from worker.sync.statistics import ExchangeStatistics
from worker.sync.world import World
from worker.trust_ratio import scale as scale_by_ratios
from worker.trust_ratio import tensors_within, trust_ratios


class ShardBuffers(NamedTuple):
    """Where a rank leaves the sums of its virtual shards for the exchange."""

    start: int  # the rank computes virtual shards start to stop - 1
    stop: int
    shards: int  # of a batch
    folding: Folding  # which slots their gradients go to
    slots: np.ndarray  # float32 (slots, parameter_count)
    rows: np.ndarray  # float64 (stop - start, total_count): each shard's totals

    def add(self, totals: np.ndarray) -> None:
        """Let what the loop says besides the shards' sums ride on the first shard's."""
        if len(self.rows):
            self.rows[0] += totals

    def pushed(self) -> tuple[np.ndarray, np.ndarray]:
        """What a worker pushes to a parameter server: its subtrees (subtrees, parameter_count), and the rows."""
        return self.slots[: len(self.folding.subtrees)], self.rows


def make_shard_buffers(world: World, shards: int, parameter_count: int, total_count: int) -> ShardBuffers:
    """Buffers of this rank alone."""
    start, stop = own_shards(shards, world.rank, world.size)
    folding = fold(start, stop, shards)
    slots = np.zeros((folding.slots, parameter_count), np.float32)
    return ShardBuffers(start, stop, shards, folding, slots, np.zeros((stop - start, total_count)))


class ReproducibleChunk(NamedTuple):
    """A piece of this rank's slice that stays in cache, with every view the step needs, made once."""

    first: int  # its first element in the flat vector
    parameters: np.ndarray
    parts: list[np.ndarray]  # of the node's subtrees
    total: np.ndarray  # where the sum over all shards comes to lie
    state: dict[str, np.ndarray]
    decayed: list[tuple[int, int]]
    tensors: slice  # which of the vector's decayed tensors these are parts of


class ReproducibleExchange(AllReduceExchange):
    """The gradient exchange of one rank: what is kept where, between steps, is the all-reduce's, and the step is not.

    Attributes:
        gradient: (parameter_count,) float32, of one virtual shard; folded into `shard_buffers` by who computes it.
        shard_buffers: what `step` takes.
    """

    shard_buffers: ShardBuffers

    def __init__(
        self,
        world: World,
        optimizer: Optimizer,
        parameter_count: int,
        decayed: list[tuple[int, int]],
        total_count: int,
        clip_norm: float,
        shards: int,
        shared_memory: bool = True,
    ) -> None:
        """`shards`: that a batch is cut into. `shared_memory`: off makes every rank its own node."""
        depth = most_slots(shards, world.size)
        self.note = leave_shared_memory(world, shared_memory, depth * parameter_count, shards * total_count)
        self._world, self._wire, self._compressed, self._carried = world, None, None, None
        self.finished = self._between_nodes = None  # a subtree's sum is finished when its last shard's gradient is
        self.node = node = Node(world)
        self.statistics = ExchangeStatistics()
        self._optimizer, self._clip_norm, self._shards = optimizer, clip_norm, shards
        self.parameters = node.shared(parameter_count, np.float32)
        self.gradient = np.zeros(parameter_count, np.float32)
        segments = node.segments(depth * parameter_count, np.float32)
        slots = [segment.reshape(depth, parameter_count) for segment in segments]
        self._segments = [slot for segment in slots for slot in segment]  # where gather_state finds room
        self._rows = node.shared(shards * total_count, np.float64).reshape(shards, total_count)
        self._node_totals = node.shared(total_count, np.float64)
        self.totals = np.zeros(total_count)
        start, stop = own_shards(shards, world.rank, world.size)
        self.shard_buffers = ShardBuffers(
            start, stop, shards, fold(start, stop, shards), slots[node.rank], self._rows[start:stop]
        )

        slices = min(world.gather_everywhere(node.size))
        owns_slice = node.rank < slices
        self.bounds = block_bounds(parameter_count, slices)[node.rank] if owns_slice else (0, 0)
        self._peers = world.comm.Split(node.rank if owns_slice else slices, world.rank)
        self._has_peers = owns_slice and self._peers.Get_size() > 1
        self.state = optimizer.init(self.bounds[1] - self.bounds[0], np.float32)
        self._subtrees: list[np.ndarray] = []  # of the node, whole
        held: list[Subtree] = []
        for local, rank in enumerate(node.comm.allgather(world.rank)):
            own = fold(*own_shards(shards, rank, world.size), shards).subtrees
            held += own
            self._subtrees.extend(slots[local][: len(own)])
        self._merges, self._remaining = merge(held, shards)
        self._open_peers()
        # Of the whole gradient for clipping, of each tensor's weights and direction for trust ratios.
        tensors = decayed if optimizer.direct else []
        self._norm_squares = SharedSquares(node, [(0, parameter_count)] if clip_norm else [])
        self._weight_squares = SharedSquares(node, tensors)
        self._direction_squares = SharedSquares(node, tensors)
        self._own_chunks = self._cut_slice(decayed)
        node.fence()

    def restore_residuals(self, state: dict[str, np.ndarray] | None) -> None:
        """What another run's wire format had yet to send is lost, with a line that says so."""
        super().restore_residuals(state)
        if self._carried is not None:
            self._carried = None
            self.note = "\n".join(filter(None, (self.note, residuals.LOST)))

    def step(self, step: int, samples: int, learning_rate: float) -> None:
        """Turn everyone's shards into new `parameters`; as AllReduceExchange."""
        node, statistics = self.node, self.statistics
        began = perf_counter()
        self.shard_buffers.add(self.totals)
        self._fence()
        self._exchange_totals()
        for chunk in self._own_chunks:
            for into, source in self._merges:
                np.add(chunk.parts[into], chunk.parts[source], out=chunk.parts[into])
        if self._has_peers:
            self._gather_subtrees()
        for chunk in self._own_chunks:
            np.divide(chunk.total, np.float32(samples), out=chunk.total)
        if self._clip_norm:
            self._clip()
        updating = -perf_counter()
        self._world.beat.phase("update")
        ratios = self._directed(step) if self._optimizer.direct else None
        for chunk in self._own_chunks:
            if ratios is not None:
                scale_by_ratios(chunk.total, chunk.decayed, ratios[chunk.tensors])
            self._optimizer.update(
                chunk.parameters, chunk.total, chunk.state, step, learning_rate, chunk.decayed
            )  # fmt: skip
        updating += perf_counter()
        self._world.beat.phase("publish")
        self._fence()
        statistics.exchange_seconds += perf_counter() - began - updating
        statistics.update_seconds += updating
        if node.size > 1:
            elements, parts = self.bounds[1] - self.bounds[0], len(self.shard_buffers.folding.subtrees)
            statistics.received("shared_memory", 4 * elements * (len(self._subtrees) - parts))
            statistics.sent("shared_memory", 4 * (self.gradient.size - elements) * parts)
        self.totals[:] = self._node_totals

    def _fence(self) -> None:
        began = perf_counter()
        self.node.fence()
        self.statistics.wait_seconds += perf_counter() - began

    def _exchange_totals(self) -> None:
        """All shards' totals added in their order; the lowest rank of each node does it for its node."""
        if self.node.rank != 0:
            return
        rows = self._rows
        if self._peers.Get_size() > 1:
            from mpi4py import MPI

            rows = np.empty_like(self._rows)  # a row is of one node, and 0 on the others: any order gives one sum
            self._peers.Allreduce(self._rows, rows, op=MPI.SUM)
        self._node_totals[:] = shard_totals(rows)

    def _open_peers(self) -> None:
        """What the peers on other nodes send, and how it is merged with ours. Collective among the peers."""
        elements = self.bounds[1] - self.bounds[0]
        remaining = list(self._remaining.values())
        everyones = [[Subtree(*part) for part in parts] for parts in self._peers.allgather(remaining)]
        parts = list(itertools.chain(*everyones)) if self._has_peers else []
        self._peer_counts = [len(parts) * elements for parts in everyones]
        self._peer_merges, whole = merge(parts, self._shards)
        self._received = np.empty((len(parts), elements), np.float32)
        self._outgoing = np.empty((len(remaining) if parts else 0, elements), np.float32)
        # The part that holds the sum over all shards in the end; a rank without a slice has none.
        self._root = next(iter(whole if self._has_peers else self._remaining), 0)

    def _gather_subtrees(self) -> None:
        """Everyone's subtrees of this slice, merged into the sum over all shards."""
        start, stop = self.bounds
        for row, number in zip(self._outgoing, self._remaining, strict=True):
            np.copyto(row, self._subtrees[number][start:stop])
        self._peers.Allgatherv(self._outgoing.reshape(-1), (self._received.reshape(-1), self._peer_counts))
        self.statistics.sent("mpi", self._outgoing.nbytes)
        self.statistics.received("mpi", self._received.nbytes - self._outgoing.nbytes)
        for into, source in self._peer_merges:
            np.add(self._received[into], self._received[source], out=self._received[into])

    def _clip(self) -> None:
        """Scale the mean gradient down to `clip_norm`."""
        for chunk in self._own_chunks:
            self._norm_squares.write(chunk.total, chunk.first)
        self._fence()
        factor = np.float32(norm_factor(math.fsum(self._norm_squares.totals()), self._clip_norm))
        for chunk in self._own_chunks:
            np.multiply(chunk.total, factor, out=chunk.total)

    def _directed(self, step: int) -> np.ndarray:
        """Turn the mean gradient into the step's direction; returns each tensor's trust ratio."""
        assert self._optimizer.direct is not None
        for chunk in self._own_chunks:
            self._optimizer.direct(chunk.parameters, chunk.total, chunk.state, step, chunk.decayed)
            self._weight_squares.write(chunk.parameters, chunk.first)
            self._direction_squares.write(chunk.total, chunk.first)
        self._fence()
        return trust_ratios(np.array([self._weight_squares.totals(), self._direction_squares.totals()]).T)

    def _cut_slice(self, decayed: list[tuple[int, int]]) -> list[ReproducibleChunk]:
        start, stop = self.bounds
        chunks = []
        for low in range(start, stop, CHUNK_ELEMENTS):
            high = min(low + CHUNK_ELEMENTS, stop)
            here, within = slice(low, high), slice(low - start, high - start)
            total = self._received[self._root][within] if self._has_peers else self._subtrees[self._root][here]
            chunks.append(
                ReproducibleChunk(
                    low,
                    self.parameters[here],
                    [subtree[here] for subtree in self._subtrees],
                    total,
                    {name: array[within] for name, array in self.state.items()},
                    [(max(a, low) - low, min(b, high) - low) for a, b in decayed if a < high and b > low],
                    tensors_within(decayed, low, high),
                )
            )
        return chunks


class SharedSquares:
    """Sums of squares of ranges of the flat vector, each rank of a node writing those of its slice's blocks."""

    def __init__(self, node: Node, ranges: Ranges) -> None:
        self._pieces = pieces(ranges)
        self._starts = [piece.start for piece in self._pieces]
        self._ranges = len(ranges)
        self._values = node.shared(len(self._pieces), np.float64)

    def write(self, vector: np.ndarray, first: int) -> None:
        """Of the pieces in `vector`, whose first element is element `first` of the flat one and a block's."""
        here = slice(bisect_left(self._starts, first), bisect_left(self._starts, first + len(vector)))
        self._values[here] = square_sums(vector, first, self._pieces[here])

    def totals(self) -> list[float]:
        """Of each range, once every rank has written and a fence has passed."""
        return exact_totals(self._values, self._pieces, self._ranges)
