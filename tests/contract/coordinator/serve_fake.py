"""`paceline serve` as its own process, with the fake launcher: MPIRUN LISTEN HTTP STATE [SLOTS [STORE [LIMIT ...]]]."""

import sys
from pathlib import Path

from coordinator.launchers import local
from coordinator.serve import serve

mpirun, listen, http, state, *more = sys.argv[1:]
slots, store, *limits = [*more, *("2", "")[len(more) :]]
local.find_mpirun = lambda: mpirun
local.find_worker = lambda: "paceline-worker"
sys.exit(serve(listen, http, Path(state), [], int(slots), store, limits))
