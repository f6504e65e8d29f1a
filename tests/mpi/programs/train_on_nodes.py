"""Under mpirun: `paceline-worker` with the ranks on pretended nodes. Arguments: ranks a node, then the worker's own."""

import functools
import sys

from worker.sync import world

world.World = functools.partial(world.World, ranks_per_node=int(sys.argv.pop(1)))

from worker.__main__ import main  # noqa: E402  # after the ranks' place is known

main()
