"""Under mpirun: bytes that the exchange of a large model adds to each rank's proportional set size; rank 0 saves them.

Arguments: output file, parameter count.
"""

import sys
from pathlib import Path

import numpy as np

from worker.optimizers import make_optimizer
from worker.sync.all_reduce import AllReduceExchange
from worker.sync.world import World


def proportional_bytes() -> int:
    """Private pages and, of each shared one, this process's share."""
    return 1024 * int(Path("/proc/self/smaps_rollup").read_text().partition("\nPss:")[2].split()[0])


def main() -> None:
    from protos.job_file import parse_job
    from protos.rules import resolve

    text = (
        "{data: {train: {built_in: digits}}, model: [{dense: {units: 3}}], loss: mean_squared_error, optimizer: adam}"
    )
    optimizer = make_optimizer(resolve(parse_job(text)).optimizer)
    world = World()
    world.gather_everywhere(proportional_bytes())  # MPI has its own buffers by now
    before = proportional_bytes()
    exchange = AllReduceExchange(world, optimizer, int(sys.argv[2]), [], 1)
    for step in (1, 2):
        exchange.gradient[:] = 1
        exchange.step(step, world.size, 0.01)
    world.gather_everywhere(None)  # everyone has touched everything
    grown = world.gather_everywhere(proportional_bytes() - before)
    if world.rank == 0:
        np.save(sys.argv[1], np.array(grown))
    exchange.close()


main()
