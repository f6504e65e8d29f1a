"""Under mpirun: some steps of the all-reduce exchange on random gradients; rank 0 saves the weights and totals.

Arguments: output folder, ranks a node (0: ask MPI), parameter count, steps, and optimizers as NAME or NAME:NORM with
the norm to clip to; each leaves a file of that name. The gradients of all eight virtual workers are a function of the
step alone, and each rank sums those that fall to it, so every world does the same sums.
"""

import sys
from pathlib import Path

import numpy as np

from protos import job_pb2
from worker.data.sharding import share
from worker.optimizers import make_optimizer
from worker.sync.all_reduce import AllReduceExchange
from worker.sync.world import World

VIRTUAL_WORKERS = 8


def main() -> None:
    folder, ranks_per_node, elements, steps = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    world = World(ranks_per_node=ranks_per_node or None)
    gradients = [sum_share(world, elements, step) for step in range(1, steps + 1)]
    for optimizer in sys.argv[5:]:
        kind, _, clip_norm = optimizer.partition(":")
        result = run_steps(world, kind, gradients, float(clip_norm or 0))
        if world.rank == 0:
            np.savez(folder / f"{optimizer}.npz", **result)


def sum_share(world: World, elements: int, step: int) -> np.ndarray:
    """The gradient of the virtual workers that fall to this rank."""
    low, high = share(0, VIRTUAL_WORKERS, world.rank, world.size)
    gradients = np.random.default_rng(step).standard_normal((VIRTUAL_WORKERS, elements))
    return gradients.astype(np.float32)[low:high].sum(axis=0)


def run_steps(world: World, kind: str, gradients: list[np.ndarray], clip_norm: float) -> dict[str, np.ndarray]:
    elements = len(gradients[0])
    spec = job_pb2.Optimizer()
    getattr(spec, kind).SetInParent()
    getattr(spec, kind).learning_rate = 0.01
    fill_defaults(spec)
    # Two weight tensors that meet, and a bias.
    decayed = [(0, elements // 3), (elements // 3, elements // 2)]
    exchange = AllReduceExchange(world, make_optimizer(spec), elements, decayed, 2, clip_norm)
    if exchange.node.rank == 0:
        exchange.parameters[:] = np.random.default_rng(0).standard_normal(elements)
    exchange.publish_parameters()
    low, high = share(0, VIRTUAL_WORKERS, world.rank, world.size)
    for step, gradient in enumerate(gradients, 1):
        exchange.gradient[:] = gradient
        exchange.totals[:] = high - low, world.rank
        exchange.step(step, VIRTUAL_WORKERS, 0.01)
        assert exchange.totals.tolist() == [VIRTUAL_WORKERS, sum(range(world.size))], exchange.totals
    # Copies, because what shares memory with the others is gone with the exchange.
    result = {name: np.copy(array) for name, array in exchange.gather_state().items()}
    result["parameters"] = np.copy(exchange.parameters)
    same = world.gather_everywhere(float(exchange.parameters.sum(dtype=np.float64)))
    assert len(set(same)) == 1, same
    exchange.close()
    return result


def fill_defaults(spec: job_pb2.Optimizer) -> None:
    from protos.rules import resolve

    job = job_pb2.JobSpec(optimizer=spec)
    spec.CopyFrom(resolve(job).optimizer)


main()
