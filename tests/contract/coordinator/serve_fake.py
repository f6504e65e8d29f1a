"""`paceline serve` as its own process, with the fake launcher: MPIRUN LISTEN HTTP STATE [SLOTS]."""

import sys
from pathlib import Path

from coordinator.launchers import local
from coordinator.serve import serve

mpirun, listen, http, state, *slots = sys.argv[1:]
local.find_mpirun = lambda: mpirun
local.find_worker = lambda: "paceline-worker"
sys.exit(serve(listen, http, Path(state), [], int(slots[0]) if slots else 2))
