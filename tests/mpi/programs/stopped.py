"""`paceline-worker` with ranks that pretend to be several nodes, one of which is signalled in a step of its choice.

Arguments: RANKS_PER_NODE RANK STEP SIGNAL, then those of paceline-worker. The signal is sent as that rank begins the
step, and known to it before the step ends: so training stops behind this very step. SIGKILL ends the rank there.
"""

import os
import signal
import sys
import time

from worker import __main__
from worker.beat import Beat
from worker.sync.world import World
from worker.termination import StopRequest

ranks_per_node, rank, step = map(int, sys.argv[1:4])
number = signal.Signals[sys.argv[4]]
sys.argv[1:5] = []
requests = []
init, init_world, begin_step = StopRequest.__init__, World.__init__, Beat.step


def make(self):
    init(self)
    requests.append(self)


def begin(self, number_of_step, epoch):
    begin_step(self, number_of_step, epoch)
    if number_of_step == step and self.seen().rank == rank:
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + 30
        while requests[0].asked is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)


StopRequest.__init__ = make
Beat.step = begin
World.__init__ = lambda self: init_world(self, ranks_per_node or None)
__main__.main()
