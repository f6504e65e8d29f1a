"""Under mpirun: `paceline-worker` on pretended nodes, reporting as often as it may.

Arguments: ranks a node, then those of `paceline-worker`.
"""

import functools
import sys

import worker.sync.world
import worker.train
from worker.__main__ import main

worker.sync.world.World = functools.partial(worker.sync.world.World, ranks_per_node=int(sys.argv.pop(1)))
worker.train.REPORT_SECONDS = 0
main()
