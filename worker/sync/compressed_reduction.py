"""Sums between nodes in fewer bytes: what an owner of a slice exchanges with its peers on the other nodes.

What is encoded is this node's part of the mean gradient, so that a residual means the same in a short last batch, plus
the residual of the steps before. Two ways, by the format:

- Numbers of 8 or 16 bits: reduce-scatter and all-gather, encoded both ways. Each peer owns a part of the slice: it
  takes the others' encoded parts, adds them to its own in float32 and in the order of the peers, and sends all of them
  the encoded sum. What the first encoding lost stays with the sender and what the second lost with the owner of the
  part, so one residual for each element of the slice holds both. 2 (P-1)/P of the encoded slice leave each peer.
- Top-k and signs, whose sums are not of their kind: every peer sends all of its slice to every other, P-1 encoded
  slices, and adds up what came in the order of the peers.

Rules: every node computes the sum from the same bytes in the same order, so the weights are the same bits everywhere.
Nothing is sent before the message that it answers is expected: receives are posted first, and encoding the next part
overlaps with sending the one before.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np

from protos import job_pb2
from worker.compression import FORMATS, kind_of, make_codec
from worker.compression.codec import BLOCK_ELEMENTS, Codec, blocks, decode, encode_with_feedback, encoded_bytes
from worker.engine.layers.layer import Finished
from worker.engine.params import ParameterSlot
from worker.sync.between_nodes import Slice, sum_in_order
from worker.sync.compression_costs import CompressionCosts, uncompressed
from worker.sync.statistics import ExchangeStatistics

GATHER, SPREAD = 1, 2  # tags: parts on their way to their owner, and sums on their way back


class Wire(NamedTuple):
    """How gradients travel between nodes."""

    wire_format: job_pb2.WireFormat
    slots: tuple[ParameterSlot, ...]  # of the flat vector: which of it are matrices

    @property
    def kind(self) -> str:
        """The format's word."""
        return kind_of(self.wire_format)

    @property
    def lossy(self) -> bool:
        """Whether there is something to encode, and a residual."""
        return self.kind != "float32"


class CompressedReduction(Protocol):
    """A sum over the peers that own the same slice; collective among them.

    Attributes:
        residual: (elements of the slice,) float32, what this node has yet to send, in units of the mean gradient.
        costs: what it took.
    """

    residual: np.ndarray
    costs: CompressionCosts

    def reduce(self, total: np.ndarray, samples: int) -> None:
        """Turn this node's sum into the sum over all nodes, in place; `samples` is the whole batch's."""

    def factors(self) -> np.ndarray:
        """(any,) float32: what else the next step depends on, the same on every node; empty for most formats."""

    def take_factors(self, factors: np.ndarray) -> None:
        """Go on from what `factors` gave."""


class CompressedSlice:
    """As BetweenNodes: the slice is summed over the node, then reduced between the nodes in fewer bytes.

    Attributes:
        node, nodes: this node's place among the slice's owners, and how many they are.
        slices: how many there are.
        bounds: of the slice; empty on a rank that owns none.
        reduction: what exchanges it; None on a rank that owns none.
    """

    finished: Finished | None = None  # all of the slice is encoded at once
    lines: list[str]

    def __init__(self, own: Slice, owns_slice: bool, slices: int, wire: Wire, statistics: ExchangeStatistics) -> None:
        """Collective over the slice's owners."""
        self._own, self._kind, self._statistics = own, wire.kind, statistics
        self.lines = [f"gradients travel between nodes as {wire.kind}, and what that loses with the next step's"]
        self.node, self.nodes, self.slices = own.peers.Get_rank(), own.peers.Get_size(), slices
        self.bounds = (own.start, own.start + own.total.size)
        # A communicator of its own: what else the peers exchange cannot come between.
        self.reduction = open_reduction(wire, own.peers.Dup(), self.bounds) if owns_slice else None

    def finish(self, samples: int) -> None:
        """As in BetweenNodes."""
        if self.reduction is None:
            return
        sum_in_order(self._own.gradients, self._own.total)
        self.reduction.reduce(self._own.total, samples)
        self._statistics.sent("mpi", self.reduction.costs.last_sent_bytes)
        self._statistics.received("mpi", self.reduction.costs.last_sent_bytes)

    def facts(self) -> dict[str, Any]:
        """As in BetweenNodes: what compression cost and saved on this rank."""
        return self.reduction.costs.facts(self._kind) if self.reduction else uncompressed(self._kind)


def open_reduction(wire: Wire, peers: Any, bounds: tuple[int, int]) -> CompressedReduction:
    """What reduces the slice at `bounds` in the job's wire format."""
    if wire.kind == "power_sgd":
        from worker.sync.power_sgd_reduction import PowerSgdReduction

        return PowerSgdReduction(peers, wire.wire_format.power_sgd.rank, bounds, wire.slots)
    elements = bounds[1] - bounds[0]
    kind = ReduceScatter if FORMATS[wire.kind].sums_well else AllGather
    return kind(peers, make_codec(wire.wire_format), elements)


class _WithoutFactors:
    """What a format that has only residuals says of factors."""

    def factors(self) -> np.ndarray:
        """As in CompressedReduction."""
        return np.empty(0, np.float32)

    def take_factors(self, factors: np.ndarray) -> None:
        """As in CompressedReduction."""


class ReduceScatter(_WithoutFactors):
    """Encoded parts to their owners, encoded sums back."""

    def __init__(self, peers: Any, codec: Codec, elements: int) -> None:
        self.residual = np.zeros(elements, np.float32)
        self.costs = CompressionCosts(peers)
        self._peers, self._codec = peers, codec
        self._rank, size = peers.Get_rank(), peers.Get_size()
        edges = [elements * part // size for part in range(size + 1)]
        self._parts = [slice(edges[part], edges[part + 1]) for part in range(size)]
        own = self._parts[self._rank]
        self._own_elements = own.stop - own.start
        self._scratch = np.empty(BLOCK_ELEMENTS, np.float32)
        self._sum = np.empty(min(BLOCK_ELEMENTS, self._own_elements), np.float32)
        # What goes to each owner, what each sends for our part, and the sums of all parts.
        lengths = [encoded_bytes(codec, part.stop - part.start) for part in self._parts]
        self._outgoing = [np.empty(length, np.uint8) for length in lengths]
        self._incoming = [np.empty(lengths[self._rank], np.uint8) for _ in lengths]
        self._sums = [np.empty(length, np.uint8) for length in lengths]
        # Each begins with another, so that no owner is everybody's first.
        self._others = [(self._rank + distance) % size for distance in range(1, size)]

    def reduce(self, total: np.ndarray, samples: int) -> None:
        """As in CompressedReduction."""
        from mpi4py import MPI

        peers, costs, rank = self._peers, self.costs, self._rank
        scale, own = np.float32(1 / samples), self._parts[rank]
        costs.begin()
        gathered = [peers.Irecv(self._incoming[other], other, GATHER) for other in self._others]
        spread = {other: peers.Irecv(self._sums[other], other, SPREAD) for other in self._others}
        sends = []
        for other in self._others:
            part = self._parts[other]
            with costs.coding():
                encode_with_feedback(
                    self._codec, total[part], scale, self.residual[part], self._outgoing[other], self._scratch
                )
            sends.append(peers.Isend(self._outgoing[other], other, GATHER))
        MPI.Request.Waitall(gathered)
        with costs.coding():
            self._add_up(total[own], scale)
        sends += [peers.Isend(self._sums[rank], other, SPREAD) for other in self._others]
        with costs.coding():
            self._take(total, rank, samples)
        for other, request in spread.items():
            request.Wait()
            with costs.coding():
                self._take(total, other, samples)
        MPI.Request.Waitall(sends)
        sent = sum(len(self._outgoing[other]) for other in self._others) + len(self._sums[rank]) * len(self._others)
        costs.end(sent, len(total))

    def _add_up(self, values: np.ndarray, scale: np.float32) -> None:
        """The sum of our part over all peers, encoded into `_sums`; ours is taken as it is."""
        codec, residual = self._codec, self.residual[self._parts[self._rank]]
        for here, there in blocks(codec, self._own_elements):
            length = here.stop - here.start
            added, scratch = self._sum[:length], self._scratch[:length]
            added[:] = 0
            for peer, encoded in enumerate(self._incoming):
                if peer == self._rank:
                    np.multiply(values[here], scale, out=scratch)
                else:
                    codec.decode(encoded[there], scratch)
                np.add(added, scratch, out=added)
            encode_with_feedback(
                codec, added, np.float32(1), residual[here], self._sums[self._rank][there], self._scratch
            )

    def _take(self, total: np.ndarray, owner: int, samples: int) -> None:
        part = total[self._parts[owner]]
        for here, there in blocks(self._codec, len(part)):
            self._codec.decode(self._sums[owner][there], part[here])
            np.multiply(part[here], np.float32(samples), out=part[here])


class AllGather(_WithoutFactors):
    """Everybody's encoded slice to everybody."""

    def __init__(self, peers: Any, codec: Codec, elements: int) -> None:
        self.residual = np.zeros(elements, np.float32)
        self.costs = CompressionCosts(peers)
        self._peers, self._codec, self._rank = peers, codec, peers.Get_rank()
        length = encoded_bytes(codec, elements)
        self._encoded = [np.empty(length, np.uint8) for _ in range(peers.Get_size())]
        self._scratch = np.empty(BLOCK_ELEMENTS, np.float32)

    def reduce(self, total: np.ndarray, samples: int) -> None:
        """As in CompressedReduction."""
        from mpi4py import MPI

        peers, costs, own = self._peers, self.costs, self._encoded[self._rank]
        others = [peer for peer in range(peers.Get_size()) if peer != self._rank]
        costs.begin()
        requests = [peers.Irecv(self._encoded[other], other, GATHER) for other in others]
        with costs.coding():
            encode_with_feedback(self._codec, total, np.float32(1 / samples), self.residual, own, self._scratch)
        requests += [peers.Isend(own, other, GATHER) for other in others]
        MPI.Request.Waitall(requests)
        with costs.coding():
            for here, there in blocks(self._codec, len(total)):
                added, scratch = total[here], self._scratch[: here.stop - here.start]
                decode(self._codec, self._encoded[0][there], added)
                for encoded in self._encoded[1:]:
                    self._codec.decode(encoded[there], scratch)
                    np.add(added, scratch, out=added)
                np.multiply(added, np.float32(samples), out=added)
        costs.end(len(own) * len(others), len(total))
