"""Under mpirun: steps of the exchange with local steps on pretended nodes; rank 0 saves the weights and what it sent.

Arguments: output file, ranks a node, and as JSON a list of runs: outer (as in a job file), steps, epochs, batches (the
samples of each step of an epoch), optimizer, short (pretend that there is no shared memory). The loss is half the
squared distance to targets that are a function of sample and step alone, so the gradient depends on where a replica is.
"""

import json
import sys
from typing import Any

import numpy as np

from protos import rules
from protos.job_file import parse_job
from tests.mpi.local_reference import COUNT, RATE, gradient, job_text, start
from worker.data.sharding import share
from worker.sync import all_reduce
from worker.sync.local_steps import LocalStepsExchange
from worker.sync.world import World
from worker.update import make_update


def main() -> None:
    output, ranks_per_node, runs = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    results = {}
    for number, settings in enumerate(runs):
        world = World(ranks_per_node=ranks_per_node or None)
        results |= {f"{number}.{name}": value for name, value in run(world, settings).items()}
    if world.rank == 0:
        np.savez(output, **results)


def run(world: World, settings: dict[str, Any]) -> dict[str, Any]:
    """What rank 0 has at the end of one run; elsewhere some of it."""
    asked = all_reduce.shared_memory_shortage
    if settings.get("short"):
        all_reduce.shared_memory_shortage = lambda *_: "the test says so"
    job = rules.resolve(parse_job(job_text(settings)))
    exchange = LocalStepsExchange(world, job.sync.local, make_update(job), COUNT, [(0, COUNT // 3)], 4, 3)
    all_reduce.shared_memory_shortage = asked
    if exchange.node.rank == 0:
        exchange.parameters[:] = start()
    exchange.publish_parameters()
    step, state = 0, np.zeros(2, np.float32)
    counted, means = [], []
    for _ in range(settings["epochs"]):
        for index, samples in enumerate(settings["batches"]):
            step += 1
            low, high = share(0, samples, world.rank, world.size)
            exchange.gradient[:] = gradient(exchange.parameters, step, range(low, high))
            exchange.totals[:] = high - low, 1, 0, 5
            exchange.step(step, samples, RATE)
            state[:] = world.rank, len(counted)
            met = exchange.meet(samples, state, ends_epoch=index == len(settings["batches"]) - 1)
            if met:
                counted.append(met)
                means.append(float(state[0]))
                assert exchange.totals[0] == met, (exchange.totals, met)
                same = world.gather_everywhere([float(exchange.parameters.sum(dtype=np.float64)), *state.tolist()])
                assert all(line == same[0] for line in same), same
    states = {name: array.copy() for name, array in exchange.gather_state().items()}
    parameters, facts = exchange.parameters.copy(), exchange.facts()
    exchange.close()
    assert facts["meetings"] == len(counted)
    told = {"counted": counted, "means": means, "sent": facts["replica_sent_bytes"], "note": exchange.note or ""}
    return {"parameters": parameters, **told, **states}


main()
