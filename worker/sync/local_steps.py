"""Local steps: replicas of the model train on their own and exchange what became of the weights, now and then.

A replica is a node, whose ranks take each step together by the all-reduce, on their share of the batch. Replica k
reaches W_k from the common weights W, having seen n_k of the n samples since; at a meeting the mean way back,
D = sum_k (n_k/n) (W - W_k), is the gradient of an outer optimizer's step on W. Gradient descent at rate 1 makes W the
replicas' mean: local SGD (Stich 2018), weighted by samples as in federated averaging (McMahan et al. 2017), so that
uneven shares count as they should. Nesterov's momentum makes it DiLoCo (Douillard et al. 2023).

Rules: replicas meet every so many steps and at the end of each epoch, and nothing is collective over them in between.
The inner optimizers' arrays stay with their replicas until an epoch ends: then they are averaged too (Wang et al. 2020,
"average buffers"), so a checkpoint of that moment holds them once, and one of an earlier meeting those of each replica
(replica_state.py). Any number of replicas can take it up, and with the same number a resumed run equals an
uninterrupted one. The model's running statistics are averaged at each meeting. A replica without a sample in a step
rests. One replica alone has nobody to meet: with plain averaging it trains as by the all-reduce, to the bit.
"""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from protos import job_pb2
from worker.data.sharding import samples_of
from worker.errors import ReplicaFault
from worker.optimizers import Optimizer, momentum, sgd
from worker.stopping import bound_of_loss, has_diverged
from worker.sync import replica_state
from worker.sync.all_reduce import AllReduceExchange, slice_bounds
from worker.sync.world import World

if TYPE_CHECKING:
    from worker.sync.reproducible import ShardBuffers

OUTER_PREFIX = "outer."  # names the outer optimizer's arrays among the inner's


class LocalStepsExchange:
    """The exchange of one rank, with the attributes of AllReduceExchange; `totals` begin with the loss. Collective.

    Args:
        total_count: how many of everything `totals` hold.
        carried: how many of the first of them are added up over the replicas; a replica needs the others for itself.
    """

    in_step = True
    first_loss: float | None = None
    shard_buffers: ShardBuffers | None = None
    guests = 0
    invitation = None

    def __init__(
        self,
        world: World,
        options: job_pb2.LocalSync,
        optimizer: Optimizer,
        parameter_count: int,
        decayed: list[tuple[int, int]],
        total_count: int,
        carried: int,
        clip_norm: float = 0.0,
    ) -> None:
        group = world.comm.Split(world.rank, 0) if options.replica == "rank" else world.node_comm
        self._world = world
        self._replica = replica = world.part(group)
        # No overlap: whether a replica takes part in a step is known when the step comes.
        self._inner = inner = AllReduceExchange(
            *(replica, optimizer, parameter_count, decayed, total_count, clip_norm), overlap=False
        )
        self.finished = inner.finished
        self.parameters, self.gradient, self.totals = inner.parameters, inner.gradient, inner.totals
        self.node, self.statistics, self.state = inner.node, inner.statistics, inner.state

        leader = replica.broadcast(world.rank)
        leaders = world.gather_everywhere(leader)
        self._ranks = [rank for rank, its_leader in enumerate(leaders) if its_leader == leader]
        self._leaders = sorted(set(leaders))
        sizes = Counter(leaders)
        self.replicas = len(sizes)
        slices = min(sizes.values())
        self._slices = slice_bounds(parameter_count, slices)
        # One replica that averages with nobody has no meetings: every step is known to all.
        self._moves = self.replicas > 1 or not options.outer.HasField("average")
        owns_slice = self._moves and replica.rank < slices
        self._bounds = self._slices[replica.rank] if owns_slice else (0, 0)
        self._peers = world.comm.Split(replica.rank if owns_slice else slices, world.rank)

        self._options = options
        self._outer, self._outer_rate = make_outer(options.outer)
        own = self._bounds[1] - self._bounds[0]
        self._outer_state = self._outer.init(own, np.float32)
        self._common = np.zeros(own, np.float32)  # this rank's slice of the weights after the last meeting
        self._change = np.zeros(own, np.float32)
        self.note = "\n".join(line for line in (inner.note, self._why_alone()) if line) or None

        self.meetings, self._sent_bytes = 0, 0
        self._carried = np.zeros(carried)  # of this replica since the last meeting
        self._steps, self._own_samples, self._samples = 0, 0, 0  # since the last meeting
        self._own_of_epoch, self._samples_of_epoch = 0, 0
        self._last_step = 0, 0.0  # its number and its learning rate
        self._last_loss = 0.0  # this replica's mean in its last step with samples
        self._first_sum, self._first_samples = 0.0, 0  # of the loss over this replica, and of the whole batch
        self._highest_loss: float | None = None  # for this replica

    def step(self, step: int, samples: int, learning_rate: float) -> None:
        """Turn the gradients of this replica into its new `parameters`; `samples` are those of the whole batch."""
        own = samples_of(self._ranks, samples, self._world.size)
        if own:
            self._inner.step(step, own, learning_rate)
            self._last_loss = float(self.totals[0]) / own
            if self._highest_loss is None:
                self._highest_loss = bound_of_loss(self._last_loss)
        if not self._first_samples:
            self._first_sum, self._first_samples = float(self.totals[0]), samples
        self._carried += self.totals[: len(self._carried)]
        self._steps += 1
        self._own_samples, self._samples = self._own_samples + own, self._samples + samples
        self._last_step = step, learning_rate

    def meet(self, samples: int, model_state: np.ndarray, ends_epoch: bool) -> int:
        """As in Exchange; `model_state` becomes its mean over the replicas.

        Raises:
            ReplicaFault: on this replica's first rank, when its loss has diverged and the next meeting is yet to come.
        """
        if not self._moves:
            return samples
        if self._steps < self._options.steps and not ends_epoch:
            self._check_loss()
            return 0
        began, updating = perf_counter(), self.statistics.update_seconds
        weight = self._own_samples / self._samples
        self._add_up(model_state, weight)
        self.meetings += 1
        self._move(weight)
        counted = self._samples
        self._own_of_epoch += self._own_samples
        self._samples_of_epoch += counted
        self._steps, self._own_samples, self._samples = 0, 0, 0
        if ends_epoch:
            self._average_state(self._own_of_epoch / self._samples_of_epoch)
            self._own_of_epoch, self._samples_of_epoch = 0, 0
        updating = self.statistics.update_seconds - updating
        self.statistics.exchange_seconds += perf_counter() - began - updating
        return counted

    def facts(self) -> dict[str, Any]:
        """As in Exchange: since the attempt began; bytes are those one replica sent to the others."""
        return self._inner.facts() | {
            "replicas": self.replicas,
            "meetings": self.meetings,
            "replica_sent_bytes": self._sent_bytes,
        }

    def gather_state(self) -> dict[str, np.ndarray]:
        """Both optimizers' arrays over the whole vector, on rank 0, behind a meeting. Collective.

        Within an epoch those of every replica's inner one.
        """
        differ = self.replicas > 1 and self._samples_of_epoch > 0
        if 0 not in self._ranks and not differ:
            return {}
        whole = self._inner.gather_state()
        if differ:
            whole |= self._gather_replicas(whole)
        if 0 not in self._ranks:  # of the outer one's they have the same
            return {}
        comm, is_first = self._replica.comm, self._replica.rank == 0
        for name, own in sorted(self._outer_state.items()):
            counts = comm.allgather(int(own.size))
            everything = np.empty(sum(counts) if is_first else 0, np.float32)
            comm.Gatherv(own, (everything, counts) if is_first else None, root=0)
            whole[OUTER_PREFIX + name] = everything
        return whole

    def _gather_replicas(self, own: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The other replicas' arrays, on rank 0, from the first rank of each."""
        counts = self._world.gather_everywhere(self._own_of_epoch)
        gathered: dict[str, np.ndarray] = {}
        for replica, leader in enumerate(self._leaders[1:], start=1):
            for name in sorted(self.state):
                if self._world.rank == 0:
                    whole = np.empty_like(self.parameters)
                    self._world.comm.Recv(whole, leader)
                    gathered[replica_state.name_of(replica, name)] = whole
                elif self._world.rank == leader:
                    self._world.comm.Send(own[name], 0)
        samples = [counts[leader] for leader in self._leaders]
        return gathered | {replica_state.SAMPLES: np.array([*samples, self._samples_of_epoch], np.float64)}

    def restore_replicas(self, found: dict[str, np.ndarray]) -> bool:
        """Let each replica take its own arrays from what rank 0 has `found` in a checkpoint. Collective.

        Returns:
            Whether there are some, of as many replicas; else nothing was done.
        """
        held = found.get(replica_state.SAMPLES)
        counts: list[float] = self._world.broadcast([] if held is None else held.tolist())
        if len(counts) != self.replicas + 1:
            return False
        own = self._leaders.index(self._ranks[0])
        for replica in range(self.replicas):
            for name in sorted(self.state):
                whole = self._world.broadcast_array(
                    found.get(replica_state.name_of(replica, name)), len(self.parameters)
                )  # fmt: skip
                if replica == own:
                    self._inner.restore_state(name, whole)
        self._own_of_epoch, self._samples_of_epoch = int(counts[own]), int(counts[-1])
        return True

    def restore_state(self, name: str, whole: np.ndarray) -> None:
        """Take this rank's slice of one of the inner optimizer's arrays."""
        self._inner.restore_state(name, whole)

    def restore_outer_state(self, found: dict[str, np.ndarray]) -> None:
        """Take the outer optimizer's arrays from what rank 0 has `found` in a checkpoint. Collective.

        A checkpoint of a run by another exchange has none: they begin as zeros.
        """
        names = self._world.broadcast(sorted(found))
        for name, own in sorted(self._outer_state.items()):
            if OUTER_PREFIX + name in names:
                whole = self._world.broadcast_array(found.get(OUTER_PREFIX + name), len(self.parameters))
                own[:] = whole[slice(*self._bounds)]

    def showing(self, name: str) -> AbstractContextManager[None]:
        """As in Exchange, behind the end of an epoch."""
        return self._inner.showing(name)

    def publish_parameters(self) -> None:
        """After the lowest rank of each node has written the common weights: let every rank of the node see them."""
        self._inner.publish_parameters()
        self._common[:] = self.parameters[slice(*self._bounds)]

    def close(self) -> None:
        """Give the shared memory back."""
        self._inner.close()

    def _why_alone(self) -> str | None:
        if self.replicas > 1:
            return None
        if self._world.size == 1:
            return "sync.local: one rank has nobody to meet; start more"
        return (
            f"sync.local: the {self._world.size} ranks share one machine's memory and so are one replica, which has "
            "nobody to meet; `replica: rank` makes each of them one"
        )

    def _check_loss(self) -> None:
        highest_loss = self._highest_loss
        if self._replica.rank != 0 or highest_loss is None or not has_diverged(self._last_loss, highest_loss):
            return
        step, learning_rate = self._last_step
        whose = f"ranks {self._ranks[0]} to {self._ranks[-1]}" if len(self._ranks) > 1 else "this rank"
        raise ReplicaFault(
            f"step {step}: the loss of {whose} is {self._last_loss:g} before the next meeting; lower the learning "
            f"rate ({learning_rate:g}), scale the features or meet more often "
            f"(sync.local.steps: {self._options.steps})"
        )

    def _add_up(self, model_state: np.ndarray, weight: float) -> None:
        """The replicas' totals and the mean of their running statistics: one rank of each speaks, all learn them."""
        carried, first_sum = len(self._carried), self._first_sum
        if self.replicas > 1:
            message = np.zeros(carried + 1 + model_state.size)
            if self._replica.rank == 0:
                message[:carried] = self._carried
                message[carried] = first_sum
                message[carried + 1 :] = weight * model_state.astype(np.float64)
            began = perf_counter()
            self._world.sum(message)  # whoever is first waits here for the slowest
            self.statistics.wait_seconds += perf_counter() - began
            self._carried[:] = message[:carried]
            first_sum = float(message[carried])
            model_state[:] = message[carried + 1 :]
        self.first_loss = first_sum / self._first_samples
        self.totals[:carried] = self._carried
        self._carried[:] = 0

    def _move(self, weight: float) -> None:
        """The outer step: D -> new common weights, on every replica."""
        own, common, change = self.parameters[slice(*self._bounds)], self._common, self._change
        np.subtract(common, own, out=change)
        self._sum_over_replicas(change, weight)
        began = perf_counter()
        self._outer.update(common, change, self._outer_state, self.meetings, self._outer_rate, [])
        self.statistics.update_seconds += perf_counter() - began
        np.copyto(own, common)
        self._publish()

    def _average_state(self, weight: float) -> None:
        """Let the inner optimizers' arrays be their mean over the replicas.

        Replicas of unequal size cut the vector in other places, so each array passes through the node's `parameters`.
        """
        if self.replicas == 1 or not self.state:
            return
        inner, own = self._inner, self.parameters[slice(*self._bounds)]
        part = self.parameters[slice(*inner.bounds)]
        for _, array in sorted(self.state.items()):
            np.copyto(part, array)
            inner.node.fence()
            np.copyto(self._change, own)
            self._sum_over_replicas(self._change, weight)
            np.copyto(own, self._change)
            self._publish()
            np.copyto(array, part)
        inner.node.fence()
        np.copyto(own, self._common)
        self._publish()

    def _sum_over_replicas(self, values: np.ndarray, weight: float) -> None:
        """Replace this rank's slice by sum_k weight_k values_k, with the same bits on every replica."""
        if self.replicas == 1:
            return
        from mpi4py import MPI

        np.multiply(values, np.float32(weight), out=values)
        self._peers.Allreduce(MPI.IN_PLACE, values, op=MPI.SUM)
        self.statistics.sent("mpi", values.nbytes)
        self.statistics.received("mpi", values.nbytes)
        self._sent_bytes += self.parameters.nbytes

    def _publish(self) -> None:
        """Each owner has written its slice of `parameters`: let every rank of the replica see all of them."""
        if self.node.size == self._replica.size:
            self.node.fence()
            return
        for owner, bounds in enumerate(self._slices):  # no shared memory was to be had: each rank has its own copy
            self._replica.comm.Bcast(self.parameters[slice(*bounds)], root=owner)


def make_outer(options: job_pb2.OuterOptimizer) -> tuple[Optimizer, float]:
    """The outer optimizer of a resolved job and its learning rate."""
    if options.HasField("nesterov"):
        nesterov = options.nesterov
        return momentum(job_pb2.MomentumOptimizer(momentum=nesterov.momentum, nesterov=True)), nesterov.learning_rate
    return sgd(job_pb2.SgdOptimizer()), options.sgd.learning_rate if options.HasField("sgd") else 1.0
