"""Under mpirun: `paceline-worker` as if so many ranks and no more shared a machine; the number comes first."""

import functools
import sys

from worker.__main__ import main
from worker.sync import world

if __name__ == "__main__":
    world.World = functools.partial(world.World, ranks_per_node=int(sys.argv.pop(1)))
    main()
