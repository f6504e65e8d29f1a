"""Under mpirun: some steps of the all-reduce exchange on random gradients; rank 0 saves the weights and totals.

Arguments: output file, ranks a node (0: ask MPI), optimizer, parameter count, steps, norm to clip to (0: none). The
gradients of all eight virtual workers are a function of the step alone, and each rank sums those that fall to it, so
every world does the same sums.
"""

import sys

import numpy as np

from protos import job_pb2
from worker.data.sharding import share
from worker.optimizers import make_optimizer
from worker.sync.all_reduce import AllReduceExchange
from worker.sync.world import World

VIRTUAL_WORKERS = 8


def main() -> None:
    output, ranks_per_node, kind, parameter_count, steps = sys.argv[1], *sys.argv[2:6]
    clip_norm = float(sys.argv[6])
    world = World(ranks_per_node=int(ranks_per_node) or None)
    spec = job_pb2.Optimizer()
    getattr(spec, kind).SetInParent()
    getattr(spec, kind).learning_rate = 0.01
    elements = int(parameter_count)
    fill_defaults(spec)
    # Two weight tensors that meet, and a bias.
    decayed = [(0, elements // 3), (elements // 3, elements // 2)]
    exchange = AllReduceExchange(world, make_optimizer(spec), elements, decayed, 2, clip_norm)
    if exchange.node.rank == 0:
        exchange.parameters[:] = np.random.default_rng(0).standard_normal(elements)
    exchange.publish_parameters()
    low, high = share(0, VIRTUAL_WORKERS, world.rank, world.size)
    for step in range(1, int(steps) + 1):
        random = np.random.default_rng(step)
        gradients = random.standard_normal((VIRTUAL_WORKERS, elements)).astype(np.float32)
        exchange.gradient[:] = gradients[low:high].sum(axis=0)
        exchange.totals[:] = high - low, world.rank
        exchange.step(step, VIRTUAL_WORKERS, 0.01)
        assert exchange.totals.tolist() == [VIRTUAL_WORKERS, sum(range(world.size))], exchange.totals
    state = exchange.gather_state()
    if world.rank == 0:
        np.savez(output, parameters=exchange.parameters, **state)
    same = world.gather_everywhere(float(exchange.parameters.sum(dtype=np.float64)))
    assert len(set(same)) == 1, same
    exchange.close()


def fill_defaults(spec: job_pb2.Optimizer) -> None:
    from protos.rules import resolve

    job = job_pb2.JobSpec(optimizer=spec)
    spec.CopyFrom(resolve(job).optimizer)


main()
