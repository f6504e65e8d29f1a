"""Under mpirun: many sums over all ranks, of changing sizes and by ranks of changing haste; each must be right.

Arguments: ranks a node (0: ask MPI), and how many bytes of shared memory rank 1 finds free (0: as many as there are).
"""

import sys

import numpy as np

from worker.sync import reduction
from worker.sync.node import Node
from worker.sync.reduction import Reduction
from worker.sync.world import World

ROUNDS = 400


def main() -> None:
    world = World(ranks_per_node=int(sys.argv[1]) or None)
    free = int(sys.argv[2])
    if free and world.rank == 1:
        reduction.shared_memory_shortage = lambda needed: "too little" if needed > free else None
    node = Node(world)
    reduce = Reduction(world, node)
    sizes = np.random.default_rng(0).integers(1, 300, ROUNDS)
    haste = np.random.default_rng(world.rank)
    seen = []
    for number, size in enumerate(sizes):
        parts = np.random.default_rng([1, number]).standard_normal((world.size, size))
        values = parts[world.rank].copy()
        np.ones(haste.integers(0, 200_000)).sum()
        reduce(values)
        np.testing.assert_allclose(values, parts.sum(axis=0), rtol=1e-12, atol=1e-14)
        seen.append(values.tobytes().hex())
    assert len(set(world.gather_everywhere("".join(seen)))) == 1, "the ranks' sums differ in their bits"
    node.close()


main()
