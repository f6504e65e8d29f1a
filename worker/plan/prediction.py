"""What a step takes under each way of exchanging: seconds by cause, bytes, memory.

Rules: pure. Compute is forward, backward and the optimizer; exchange is this node's own bytes, their sums and their
coding, as far as they do not hide behind backward; waiting is latency, and the others' turns on a link that all use.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from worker.plan.choices import FLOAT32, Change, Choice
from worker.plan.machine import Machine, Workload
from worker.plan.network import NOTHING, Cluster, Cost, all_reduce, all_reduce_in_buckets, coded_all_reduce
from worker.wire import CHUNK_ELEMENTS

TOTALS_BYTES: Final = 32  # loss, correct answers and their kin: an all-reduce of their own at each step


class Practice(NamedTuple):
    """How the exchange goes about it."""

    buckets: bool = True  # gradients are all-reduced in buckets while backward runs; or after it, at once
    node_pushes_once: bool = False  # to the parameter server; or every rank by itself
    servers_spread: bool = False  # shards on different nodes; or all on the first


class Prediction(NamedTuple):
    """A step, as it should go."""

    choice: Choice
    compute_seconds: float
    exchange_seconds: float
    waiting_seconds: float
    sent_bytes: float  # in a step, by the node that sends most
    memory_bytes: float  # of a rank

    @property
    def step_seconds(self) -> float:
        """From one step to the next."""
        return self.compute_seconds + self.exchange_seconds + self.waiting_seconds


def predict(machine: Machine, work: Workload, cluster: Cluster, choice: Choice, practice: Practice) -> Prediction:
    """A step under one choice."""
    gradient_seconds = _gradient_seconds(machine, work, cluster)
    size = work.gradient_bytes
    slices = cluster.ranks_per_node
    update_seconds = machine.update_each * work.parameters / slices
    memory = _memory(machine, work, cluster, choice)
    if choice.kind == "parameter_server":
        cost = _push_and_pull(machine, work, cluster, choice, practice)
        return Prediction(choice, gradient_seconds, *cost, memory)

    # Within a node: each rank adds up its slice over the others' segments, between two fences.
    in_node = (slices - 1) * size / slices * machine.sum_each
    fences = 2 * machine.fence_seconds if slices > 1 else 0.0
    if choice.kind == "local":
        between = all_reduce(machine, cluster, size)
        rounds = -(-work.epoch_steps // choice.steps) / work.epoch_steps  # they meet when an epoch ends, too
        return Prediction(
            choice,
            gradient_seconds + update_seconds * (1 + rounds),
            in_node + between.transfer_seconds * rounds,
            fences + between.latency_seconds * rounds,
            between.sent_bytes * rounds,
            memory,
        )
    totals = all_reduce(machine, cluster, TOTALS_BYTES)
    between = _all_reduce(machine, work, cluster, choice, practice, gradient_seconds)
    return Prediction(
        choice,
        gradient_seconds + update_seconds,
        in_node + between.transfer_seconds,
        fences + between.latency_seconds + totals.latency_seconds,
        between.sent_bytes,
        memory,
    )


def one_node(machine: Machine, work: Workload, cluster: Cluster) -> Prediction:
    """The same batch on one of the nodes alone."""
    return predict(machine, work, cluster._replace(nodes=1), Choice("all_reduce"), Practice())


def _gradient_seconds(machine: Machine, work: Workload, cluster: Cluster) -> float:
    """Forward and backward over the largest share; ranks beyond the cores take turns."""
    share = _share(work, cluster)
    pieces = -(-share // (work.micro_batch or share))
    turns = max(1.0, cluster.ranks_per_node * machine.threads / machine.cores)
    return (pieces * machine.compute.fixed + share * machine.compute.each) * turns


def _all_reduce(
    machine: Machine, work: Workload, cluster: Cluster, choice: Choice, practice: Practice, gradient_seconds: float
) -> Cost:
    if cluster.nodes == 1:
        return NOTHING
    if choice.wire != FLOAT32:
        return coded_all_reduce(machine, cluster, work.parameters, choice.wire)

    if not practice.buckets:
        return all_reduce(machine, cluster, work.gradient_bytes)
    # Only the last piece's backward finishes anything.
    pieces = -(-_share(work, cluster) // (work.micro_batch or work.batch_size))
    backward_seconds = machine.backward_share * gradient_seconds / pieces
    return all_reduce_in_buckets(machine, cluster, work.gradient_bytes, backward_seconds)


def _share(work: Workload, cluster: Cluster) -> int:
    """Samples of the rank that has most."""
    return -(-work.batch_size // cluster.ranks)


def _push_and_pull(
    machine: Machine, work: Workload, cluster: Cluster, choice: Choice, practice: Practice
) -> tuple[float, float, float]:
    """Seconds of exchange and of waiting, and the bytes of the node that sends most.

    All pushes come in by the server's link and all answers leave by it; a chunk's answer leaves when its last push has
    arrived. So answers follow pushes with one chunk, and overlap with them, the more chunks the more, in the other
    direction; with shards on several nodes each direction carries both. The server takes the pushes one by one.
    """
    wire, back = choice.wire, choice.wire.answer or choice.wire
    push, answer = (one.bytes_per_element * work.parameters for one in (wire, back))
    pushes = 1 if practice.node_pushes_once else cluster.ranks_per_node
    hosts = min(choice.servers, cluster.nodes) if practice.servers_spread else 1
    remote = (cluster.nodes - 1) * pushes
    # With shards on other nodes too, a server's node pushes to those, and gets its weights from them.
    elsewhere = pushes * (hosts - 1) / hosts
    come = remote / hosts  # pushes that the link brings, and answers that leave by it
    chunks = max(choice.servers // hosts, round(work.parameters / hosts / CHUNK_ELEMENTS), 1)

    def on_link(come: float, elsewhere: float, links: int) -> float:
        if cluster.shared_link:
            return links * (come + elsewhere) * (push + answer) * cluster.seconds_per_byte
        most = max(come, elsewhere)
        behind = most * (push + answer)
        beside = max(come * push + elsewhere * answer, elsewhere * push + come * answer)
        return (beside + (behind - beside) / chunks) * cluster.seconds_per_byte

    def in_server(workers: float) -> float:
        return workers * work.gradient_bytes / choice.servers * machine.grpc.each

    everyone = cluster.nodes * pushes
    # A worker encodes its push and decodes the answer; the server decodes everyone's, and encodes one answer for all.
    in_shard = (everyone * wire.decode_each + back.encode_each) / choice.servers
    coding = (wire.encode_each + back.decode_each + in_shard) * work.parameters
    whole = max(on_link(come, elsewhere, hosts), in_server(everyone))
    alone = max(on_link(pushes, 0.0, 1), in_server(pushes)) if cluster.nodes > 1 else whole
    latency = machine.grpc.fixed + (2 * cluster.latency_seconds if cluster.nodes > 1 else 0.0)
    within = (cluster.ranks_per_node - 1) * work.gradient_bytes / cluster.ranks_per_node * machine.sum_each
    summed = within if practice.node_pushes_once else 0.0
    own = min(alone, whole)
    return own + coding + summed, whole - own + latency, come * answer + elsewhere * push


def _memory(machine: Machine, work: Workload, cluster: Cluster, choice: Choice) -> float:
    """Program and data, gradient, and this rank's part of what the node holds once."""
    share = _share(work, cluster)
    at_once = min(share, work.micro_batch or share)
    held = machine.base_memory_bytes + work.gradient_bytes + work.buffer_bytes * at_once
    if work.micro_batch and work.micro_batch < share:
        held += work.gradient_bytes
    residual = 1 if choice.change is Change.ROUNDING else 0
    if choice.kind == "parameter_server":
        return held + work.gradient_bytes * (1 + residual / cluster.ranks_per_node)
    vectors = 1 + work.state_arrays + (1 if cluster.nodes > 1 else 0) + (2 if choice.kind == "local" else 0)
    return held + (vectors + residual) * work.gradient_bytes / cluster.ranks_per_node
