"""What it costs to move bytes between nodes: the network, MPI's all-reduce on it, and what hides behind backward.

Rules: pure. A node's link carries `bytes_per_second` each way at once, unless all nodes share one medium. The cost of a
collective is that of Thakur, Rabenseifner and Gropp (Optimization of Collective Communication Operations in MPICH,
2005): messages one after another, each a latency and its bytes, and the bytes that are added up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from worker.plan.choices import WireFormat
from worker.plan.machine import FLOAT32_BYTES, Machine, Ready
from worker.sync.bucket_size import AT_ONCE, best_size, measured_seconds

# TCP's payload in an Ethernet frame of 1500 bytes with its preamble and gap: 1448 of 1538.
PAYLOAD_SHARE: Final = 1448 / 1538


class Cluster(NamedTuple):
    """Nodes like the measured one, and what is between them."""

    nodes: int
    ranks_per_node: int
    bytes_per_second: float  # of a node's link, each way; of the one medium where it is shared
    latency_seconds: float  # of the network, one way
    shared_link: bool = False

    @property
    def ranks(self) -> int:
        """Over all nodes."""
        return self.nodes * self.ranks_per_node

    @property
    def seconds_per_byte(self) -> float:
        """Of payload on one link."""
        return 1 / (PAYLOAD_SHARE * self.bytes_per_second)


class Cost(NamedTuple):
    """Of an exchange between nodes."""

    transfer_seconds: float  # bytes on their way, and sums
    latency_seconds: float
    sent_bytes: float  # by the node that sends most

    @property
    def seconds(self) -> float:
        """From beginning to end."""
        return self.transfer_seconds + self.latency_seconds


NOTHING: Final = Cost(0.0, 0.0, 0.0)


class Collective(NamedTuple):
    """An all-reduce of `size` bytes among p processes, in units of that size."""

    messages: int  # one after another
    path: float  # bytes one after another, over size
    sent: float  # by all processes together, over size
    summed: float  # bytes added up one after another, over size


def recursive_doubling(processes: int) -> Collective:
    """Log2 p rounds in which partners exchange the whole vector; p beyond a power of two join before and behind."""
    power, rounds, rest = _powers(processes)
    folds = 2 if rest else 0
    return Collective(rounds + folds, rounds + folds, power * rounds + 2 * rest, rounds + folds / 2)


def rabenseifner(processes: int) -> Collective:
    """Reduce-scatter by recursive halving, then all-gather by recursive doubling: 2 log2 p rounds, 2 (p-1)/p vectors.

    Processes beyond a power of two halve with a neighbour, hand it their half and get the result: n/2, n/2 and n more.
    """
    power, rounds, rest = _powers(processes)
    whole = (power - 1) / power
    folds, more, summed = (3, 2.0, 0.5) if rest else (0, 0.0, 0.0)
    return Collective(2 * rounds + folds, 2 * whole + more, 2 * (power - 1) + 2.5 * rest, whole + summed)


# (processes below, bytes below): where Open MPI 4 and 5 choose recursive doubling, from its
# ompi_coll_tuned_allreduce_intra_dec_fixed; above, Rabenseifner's. The rings it takes for 16 to 256 KB among two and
# three processes move the same bytes in as many messages as that among two, and one fewer among three.
SMALL: Final = ((4, 16384), (16, 8192), (32, 4096), (math.inf, 128))


def collective(processes: int, size: float) -> Collective:
    """The all-reduce that Open MPI does."""
    if processes == 1:
        return Collective(0, 0.0, 0.0, 0.0)
    small = next(bytes_below for below, bytes_below in SMALL if processes < below)
    return recursive_doubling(processes) if size < small else rabenseifner(processes)


def all_reduce(machine: Machine, cluster: Cluster, size: float) -> Cost:
    """Of a vector of `size` bytes between nodes: each rank of a node exchanges a slice, and they share the link."""
    return _cost(machine, cluster, size, collective(cluster.nodes, size / cluster.ranks_per_node))


def coded_all_reduce(machine: Machine, cluster: Cluster, elements: float, wire: WireFormat) -> Cost:
    """Of a vector in a wire format.

    Factors are all-reduced as they are. Else:
    Where sums code well, each of P nodes owns a part: coded parts go to their owners and coded sums come back, which is
    2 (P-1)/P of the vector, and as much to decode. Where not, every node sends all to every other: P - 1 vectors.
    """
    if cluster.nodes == 1:
        return NOTHING
    if wire.factors:
        factored = (wire.encode_each + wire.decode_each) * elements / cluster.ranks_per_node
        sums = [all_reduce(machine, cluster, FLOAT32_BYTES * factor * elements) for factor in wire.factors]
        return Cost(
            factored + sum(cost.transfer_seconds for cost in sums),
            sum(cost.latency_seconds for cost in sums),
            sum(cost.sent_bytes for cost in sums),
        )
    others = cluster.nodes - 1
    rounds, share = (2, 2 * others / cluster.nodes) if wire.sums_well else (1, float(others))
    slices = cluster.ranks_per_node
    sent = share * wire.bytes_per_element * elements
    on_link = sent * cluster.seconds_per_byte * (cluster.nodes if cluster.shared_link else 1)
    coding = (wire.encode_each + share * wire.decode_each) * elements / slices
    summed = share / rounds * FLOAT32_BYTES * elements / slices * machine.sum_each
    return Cost(
        max(on_link, sent / slices * machine.mpi.each) + coding + summed,
        rounds * (cluster.latency_seconds + others * machine.mpi.fixed),
        sent,
    )


def bucket_bytes(machine: Machine, cluster: Cluster, size: float) -> float:
    """What a run would find best for a vector of `size` bytes: its own measurement, on the modelled network."""
    slice_bytes = math.ceil(size / cluster.ranks_per_node)

    def seconds_of(bucket: int) -> float:
        return _bucket(machine, cluster, AT_ONCE * bucket * cluster.ranks_per_node).seconds

    return best_size(measured_seconds(seconds_of, slice_bytes), slice_bytes) * cluster.ranks_per_node


def all_reduce_in_buckets(machine: Machine, cluster: Cluster, size: float, backward_seconds: float) -> Cost:
    """Of a vector whose finished parts travel while backward runs: what is left to wait for behind it."""
    if cluster.nodes == 1:
        return NOTHING
    largest = bucket_bytes(machine, cluster, size)
    return behind_backward(machine.ready, backward_seconds, largest, lambda part: _bucket(machine, cluster, part))


def behind_backward(
    ready: Sequence[Ready], backward_seconds: float, bucket_bytes: float, cost: Callable[[float], Cost]
) -> Cost:
    """What is left of the exchange when backward has ended.

    The gradient is finished from the vector's end to its front. A bucket leaves when it is full, or at the end: so the
    front of the vector, the first layer, always travels in the open. Buckets share the link, and only the last one's
    latency is waited for.
    """
    free, latency, sent, held = 0.0, 0.0, 0.0, 0.0
    last = len(ready) - 1
    for index, part in enumerate(ready):
        held += FLOAT32_BYTES * part.elements
        if held < bucket_bytes and index < last:
            continue
        # A part larger than a bucket is finished all at once, so its buckets queue.
        buckets = max(1, round(held / bucket_bytes))
        one = cost(held / buckets)
        free = max(free, part.moment * backward_seconds) + buckets * one.transfer_seconds
        latency = one.latency_seconds
        sent += buckets * one.sent_bytes
        held = 0.0
    return Cost(max(0.0, free - backward_seconds), latency, sent)


def _bucket(machine: Machine, cluster: Cluster, size: float) -> Cost:
    """A non-blocking sum, which is Rabenseifner's whatever its size (worker/sync/world.py)."""
    return _cost(machine, cluster, size, rabenseifner(cluster.nodes))


def _cost(machine: Machine, cluster: Cluster, size: float, chosen: Collective) -> Cost:
    if cluster.nodes == 1:
        return NOTHING
    slices = cluster.ranks_per_node
    on_link = (chosen.sent if cluster.shared_link else chosen.path) * size * cluster.seconds_per_byte
    in_rank = chosen.path * size / slices * machine.mpi.each
    return Cost(
        max(on_link, in_rank) + chosen.summed * size / slices * machine.sum_each,
        chosen.messages * (machine.mpi.fixed + cluster.latency_seconds),
        chosen.path * size,
    )


def _powers(processes: int) -> tuple[int, int, int]:
    """The largest power of two within, its exponent, and what is left over."""
    rounds = processes.bit_length() - 1
    return 1 << rounds, rounds, processes - (1 << rounds)
