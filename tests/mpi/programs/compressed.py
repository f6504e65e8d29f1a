"""Under mpirun: steps of the all-reduce in a wire format on random gradients; what is sent and what is left add up.

Arguments: output file, ranks a node, wire format as JSON, steps; perhaps a file such a run has left, whose residuals
are taken up, and one step without gradient is made. Plain gradient descent with rate 1 from zeros, so that
the weights are minus the sum of all means. Rank 0 saves them with the residuals.
"""

import json
import sys

import numpy as np

from protos import job_pb2
from protos.job_file import parse_job
from worker.engine.params import Parameter, lay_out
from worker.optimizers import make_optimizer
from worker.sync.all_reduce import AllReduceExchange
from worker.sync.compressed_reduction import Wire
from worker.sync.world import World

SHAPES = {"weight": (300, 200), "bias": (200,), "kernel": (32, 16, 3, 3), "narrow": (200, 3)}


def main() -> None:
    output, ranks_per_node, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[4])
    world = World(ranks_per_node=ranks_per_node or None)
    slots = lay_out([(name, Parameter(name, shape, 1, 1)) for name, shape in SHAPES.items()])
    elements = slots[-1].stop
    exchange = AllReduceExchange(
        world, make_optimizer(sgd()), elements, [], 1, wire=Wire(wire_format(sys.argv[3]), slots)
    )
    wanted = np.zeros(elements)
    if len(sys.argv) > 5:
        found = dict(np.load(sys.argv[5])) if world.rank == 0 else None
        exchange.restore_residuals(found)
        exchange.step(1, 20, 1.0)
    for step in range(1, steps + 1):
        samples = 7 if step % 3 == 0 else 20  # a short batch now and then
        gradients = np.random.default_rng(step).standard_normal((world.size, elements)).astype(np.float32) * samples
        exchange.gradient[:] = gradients[world.rank]
        exchange.totals[:] = 1
        exchange.step(step, samples, 1.0)
        wanted += gradients.sum(axis=0, dtype=np.float64) / samples
        assert exchange.totals.tolist() == [world.size]
    state = exchange.gather_state()
    same = world.gather_everywhere(exchange.parameters.tobytes().hex()[:4000] + str(exchange.parameters.sum()))
    assert len(set(same)) == 1, "the nodes' weights differ"
    if world.rank == 0:
        facts = {key: value for key, value in exchange.facts().items() if not isinstance(value, str)}
        np.savez(output, parameters=exchange.parameters, wanted=wanted, **state, **facts)
    exchange.close()


def sgd() -> job_pb2.Optimizer:
    optimizer = job_pb2.Optimizer()
    optimizer.sgd.learning_rate = 1
    return optimizer


def wire_format(text: str) -> job_pb2.WireFormat:
    """Resolved, as a job file's."""
    job = {
        "name": "x", "data": {"train": {"built_in": "digits"}}, "model": [{"dense": {"units": 2}}],
        "loss": "softmax_cross_entropy", "optimizer": "sgd",
        "sync": {"all_reduce": {"wire_format": json.loads(text)}},
    }  # fmt: skip
    return parse_job(json.dumps(job)).sync.all_reduce.wire_format


if __name__ == "__main__":
    main()
