"""Under mpirun: steps of the exchange with local steps on pretended nodes; rank 0 saves the weights and what it sent.

Arguments: output file, ranks a node, settings as JSON: outer (as in a job file), steps, epochs, batches (the samples of
each step of an epoch), optimizer, short (pretend that there is no shared memory). The loss is half the squared distance
to targets that are a function of sample and step alone, so the gradient depends on where a replica is.
"""

import json
import sys

import numpy as np

from protos import job_pb2, rules
from protos.job_file import parse_job
from tests.mpi.local_reference import COUNT, RATE, gradient, job_text, start
from worker.data.sharding import share
from worker.sync import all_reduce
from worker.sync.local_steps import LocalStepsExchange
from worker.sync.world import World
from worker.update import make_update


def main() -> None:
    output, ranks_per_node, settings = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    if settings.get("short"):
        all_reduce.shared_memory_shortage = lambda *_: "the test says so"
    world = World(ranks_per_node=ranks_per_node or None)
    job: job_pb2.JobSpec = rules.resolve(parse_job(job_text(settings)))
    exchange = LocalStepsExchange(world, job.sync.local, make_update(job), COUNT, [(0, COUNT // 3)], 4, 3)
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
            ends_epoch = index == len(settings["batches"]) - 1
            met = exchange.meet(samples, state, ends_epoch)
            if met:
                counted.append(met)
                means.append(float(state[0]))
                assert exchange.totals[0] == met, (exchange.totals, met)
                same = world.gather_everywhere([float(exchange.parameters.sum(dtype=np.float64)), *state.tolist()])
                assert all(line == same[0] for line in same), same
            if ends_epoch:
                states = {name: array.tolist() for name, array in exchange.gather_state().items()}
    facts = exchange.facts()
    assert facts["meetings"] == len(counted)
    if world.rank == 0:
        np.savez(
            output,
            parameters=exchange.parameters,
            counted=counted,
            means=means,
            sent=facts["replica_sent_bytes"],
            **states,
        )
        print(json.dumps(facts), exchange.note or "", sep="\n")
    exchange.close()


main()
