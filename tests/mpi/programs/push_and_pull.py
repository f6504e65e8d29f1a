"""One worker of a parameter server: some round trips on a gradient of ones; prints the median's seconds.

Arguments: HOST:PORT, worker, workers, elements, steps. The token is in the environment. Should it stand still for a
minute, be it at its very end, it says where and ends.
"""

import faulthandler
import os
import statistics
import sys
from time import perf_counter

import numpy as np

from protos import environment
from worker.sync.parameter_server import ParameterServerExchange

STALL_SECONDS = 60


def main() -> None:
    faulthandler.dump_traceback_later(STALL_SECONDS, exit=True)
    address = sys.argv[1]
    worker, workers, elements, steps = map(int, sys.argv[2:])
    exchange = ParameterServerExchange(
        [address], worker, workers, 1, os.environ[environment.JOB_TOKEN], "0" * 64,
        np.zeros(elements, np.float32), np.ones(elements, np.float32), np.zeros(2), timeout_seconds=60,
    )  # fmt: skip
    exchange.join()
    seconds = []
    for step in range(1, steps + 1):
        began = perf_counter()
        exchange.step(step, workers, 1e-3)
        seconds.append(perf_counter() - began)
    exchange.leave()
    print(statistics.median(seconds[1:]))


main()
