"""Under mpirun: steps of the all-reduce in a wire format on random gradients; what is sent and what is left add up.

Arguments: output file with {} for the wire format's name, ranks a node, steps, a JSON list of wire formats; perhaps a
file such a run has left, whose residuals are taken up, and one step without gradient is made. Plain gradient descent
with rate 1 from zeros, so that the weights are minus the sum of all means. Rank 0 saves them with the residuals.
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
    output, ranks_per_node, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    world = World(ranks_per_node=ranks_per_node or None)
    before = dict(np.load(sys.argv[5])) if len(sys.argv) > 5 and world.rank == 0 else None
    for wire_format in json.loads(sys.argv[4]):
        result = run_steps(world, resolve(wire_format), steps, before, goes_on=len(sys.argv) > 5)
        if world.rank == 0:
            np.savez(output.format(name_of(wire_format)), **result)


def run_steps(
    world: World, wire_format: job_pb2.WireFormat, steps: int, before: dict[str, np.ndarray] | None, goes_on: bool
) -> dict[str, np.ndarray]:
    slots = lay_out([(name, Parameter(name, shape, 1, 1)) for name, shape in SHAPES.items()])
    elements = slots[-1].stop
    exchange = AllReduceExchange(world, make_optimizer(sgd()), elements, [], 1, wire=Wire(wire_format, slots))
    wanted = np.zeros(elements)
    if goes_on:
        exchange.restore_residuals(before)
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
    facts = {key: value for key, value in exchange.facts().items() if not isinstance(value, str)}
    # Copies, because what shares memory with the others is gone with the exchange.
    left = {"parameters": exchange.parameters, **state, **facts}
    result = {"wanted": wanted} | {name: np.copy(value) for name, value in left.items()}
    exchange.close()
    return result


def name_of(wire_format: str | dict) -> str:
    return wire_format if isinstance(wire_format, str) else next(iter(wire_format))


def sgd() -> job_pb2.Optimizer:
    optimizer = job_pb2.Optimizer()
    optimizer.sgd.learning_rate = 1
    return optimizer


def resolve(wire_format: str | dict) -> job_pb2.WireFormat:
    """As a job file's is."""
    job = {
        "name": "x", "data": {"train": {"built_in": "digits"}}, "model": [{"dense": {"units": 2}}],
        "loss": "softmax_cross_entropy", "optimizer": "sgd",
        "sync": {"all_reduce": {"wire_format": wire_format}},
    }  # fmt: skip
    return parse_job(json.dumps(job)).sync.all_reduce.wire_format


if __name__ == "__main__":
    main()
