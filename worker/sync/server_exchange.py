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

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, TypeVar

import numpy as np

from protos import job_pb2
from worker.checkpoint import STATE_PREFIX
from worker.compression import kind_of
from worker.engine.layers.layer import Finished
from worker.errors import ReplicaFault, TrainingFault
from worker.invitation import Invitation
from worker.server.pushes import MOST_GUESTS
from worker.server.supervision import SupervisedServer
from worker.sync import residuals
from worker.sync.all_reduce import slice_bounds
from worker.sync.between_nodes import sum_in_order
from worker.sync.compression_costs import Costs, uncompressed
from worker.sync.exchange import TOTALS
from worker.sync.node import Node
from worker.sync.parameter_server import ParameterServerExchange
from worker.sync.reproducible import ShardBuffers
from worker.sync.server_wire import Lossy, LossyWire
from worker.sync.statistics import ExchangeStatistics, ServerCounts
from worker.sync.world import World

SUM_ELEMENTS = 1 << 15  # added up at a time, so that they stay in cache
FAULT_BYTES = 2048
STOP = TOTALS.index("stop")
REQUESTS = slice(TOTALS.index("report"), len(TOTALS))

T = TypeVar("T")


class ServerExchange:
    """The exchange of one rank with the servers; arrays as in Exchange."""

    finished: Finished | None = None
    guests = 0
    invitation: Invitation | None = None
    first_loss: float | None = None

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
        self._at_once, self.in_step = at_once, not at_once
        self._asked_to_stop = False  # this rank, in its last step
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
        self._samples_missed = 0  # of batches cut for guests that were dropped within the step
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
        self._asked_to_stop = bool(self.totals[STOP])
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
        self._note_counts()
        self._agree(fault)
        self.guests = int(told[1])
        worker.guests = tuple(told[2 : 2 + self.guests].tolist())
        self._seen_guests.update(worker.guests)
        self.totals[:] = self._node_totals
        if self._at_once:
            self.totals[REQUESTS] = 0  # ranks are not at one step, where all could do the same
        elif self.lossy:
            self.totals[REQUESTS][1:] = 0  # the weights a node holds are not quite the servers' before the epoch's end
        statistics = self.statistics
        statistics.exchange_seconds += perf_counter() - began
        statistics.sent_bytes["grpc"] = worker.sent_bytes
        statistics.received_bytes["grpc"] = worker.received_bytes
        self._tell_counts()

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
            facts["guests_dropped"] = self._worker.dropped_guests  # rank 0's worker pushes element 0, and writes facts
            facts["samples_missed"] = self._samples_missed
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
        if ends_epoch and (self._at_once or self.lossy):
            self.totals[STOP] = sum(self._world.gather_everywhere(self._asked_to_stop))
        if self._at_once:
            return samples
        counted = int(self._next_guests[0])
        self._samples_missed += samples - counted if counted else 0  # 0: a server that came back does not know
        return counted

    def gather_state(self) -> dict[str, np.ndarray]:
        """As in Exchange: rank 0 asks the servers, and every node for what it has yet to send."""
        unsent = residuals.gather(self._world, self._residual, self.parameters.size) if self.lossy else {}
        arrays = self._pull(self._world.rank == 0, state=True)
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
        """Let the node's `parameters` be an array that the servers hold. Collective."""
        arrays = self._pull(self.node.rank == 0, state, publish)
        if self.node.rank == 0:
            self.parameters[:] = arrays[name]
        self._fence()

    def _pull(self, asks: bool, state: bool, publish: bool = False) -> dict[str, np.ndarray]:
        """What the servers hold, where this rank asks; else nothing. Collective, between two steps.

        One that died since the last step does not know how far its workers are, nor they what it has lost. All join it
        again, which counts and says it, before anybody goes on with what it holds.
        """
        while True:
            arrays = self._together(lambda: self._worker.pull(state, publish) if asks else {})
            if not any(self._world.gather_everywhere(self._worker.found_returned)):
                return arrays
            self._together(self._worker.meet_again)
            self._note_counts()
            self._fence()
            self._tell_counts()

    def _together(self, act: Callable[[], T]) -> T:
        """`act`, whose fault on any rank is raised on each."""
        fault: TrainingFault | None = None
        try:
            result = act()
        except TrainingFault as found:
            fault = found
        told = [text for text in self._world.gather_everywhere(str(fault) if fault else "") if text]
        if told:
            raise TrainingFault(told[0]) from fault
        return result

    def _note_counts(self) -> None:
        """Let the node know what this rank has counted, behind its next fence."""
        worker = self._worker
        self._counts[self.node.rank][:] = worker.restarts, worker.steps_lost, worker.sent_bytes

    def _tell_counts(self) -> None:
        """Rank 0 reports what its node has counted, in which each server is counted once."""
        if self._world.rank == 0:
            restarts, lost, _ = np.sum(self._counts, axis=0).tolist()
            self.statistics.servers = ServerCounts(
                *(restarts, lost, self._worker.workers + self.guests, self._worker.dropped_guests)
            )

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
        """Fence, behind which a fault of any rank of the node is raised on each of them.

        Where nodes go on at their own pace it is their own, and the others do not know of it.
        """
        if fault is not None:
            text = np.frombuffer(str(fault).encode()[:FAULT_BYTES], np.uint8)
            self._faults[self.node.rank][: len(text)] = text
        self._fence()
        for told in self._faults:
            if told[0]:
                kind = ReplicaFault if self._at_once else TrainingFault
                raise kind(told.tobytes().rstrip(b"\0").decode(errors="replace")) from fault

    def _fence(self) -> None:
        began = perf_counter()
        self.node.fence()
        self.statistics.wait_seconds += perf_counter() - began
