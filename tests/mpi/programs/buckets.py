"""Under mpirun: small jobs trained on nodes of every kind, with and without overlap; rank 0 saves what they come to.

Arguments: output file, then how many ranks a node has, once for each kind (0: ask MPI). Saves `<case>/<ranks a
node>/<overlap>` with the weights, and the same with `/early`: how many buckets set out within backward on the rank that
had most. Between nodes the smallest buckets are 1 KB, so that these models have several.
"""

import itertools
import json
import sys

import numpy as np

from protos.job_file import parse_job
from protos.rules import resolve
from worker.accumulation import Accumulator
from worker.data.batches import BatchReader
from worker.data.preprocessing import Preprocessing
from worker.data.sharding import share
from worker.data.sources import Dataset
from worker.engine.layers.layer import Moment
from worker.engine.model import Model
from worker.engine.params import decayed_ranges
from worker.measurements import Meter
from worker.sync import bucket_size
from worker.sync.all_reduce import AllReduceExchange
from worker.sync.reduction import Reduction
from worker.sync.world import World
from worker.update import make_update

STEPS, BATCH = 6, 10  # on five ranks and more some are without samples in the last step
SYNCHRONIZED = {"batch_norm": {"synchronized": True}}
CONVOLUTION = {"conv2d": {"filters": 6, "kernel": 3, "padding": "same"}}
DENSE = [{"dense": {"units": 64}}, "relu", {"dense": {"units": 32}}, "tanh", {"dense": {"units": 3}}]
IMAGES = [
    CONVOLUTION, SYNCHRONIZED, "relu", {"max_pool2d": {"size": 2}},
    {"residual": {"layers": [CONVOLUTION, SYNCHRONIZED, "tanh", CONVOLUTION]}},
    {"dense": {"units": 24}}, "tanh", {"dense": {"units": 3}},
]  # fmt: skip
TOKENS = [
    {"embedding": {"vocabulary": 40, "units": 16}}, "positions",
    {"residual": {"layers": ["layer_norm", {"attention": {"heads": 2, "causal": True}}]}},
    {"residual": {"layers": ["layer_norm", {"linear": {"units": 32}}, "gelu", {"linear": {"units": 16}}]}},
    {"dense": {"units": 3}},
]  # fmt: skip
# name: layers, shape of a sample, optimizer, training.
CASES = {
    "momentum": (DENSE, (20,), {"momentum": {"learning_rate": 0.05}}, {}),
    "pieces": (DENSE, (20,), {"momentum": {"learning_rate": 0.05}}, {"micro_batch": 2}),
    "clipped": (DENSE, (20,), {"adam": {"learning_rate": 0.01}}, {"clip_norm": 0.5}),
    "images": (IMAGES, (6, 6, 2), {"momentum": {"learning_rate": 0.05}}, {}),
    "tokens": (TOKENS, (6,), {"lamb": {"learning_rate": 0.01}}, {}),
}


def main() -> None:
    bucket_size.SIZES_BYTES = (1 << 10, 4 << 10)
    results: dict[str, np.ndarray] = {}
    for name, ranks_per_node, overlap in itertools.product(CASES, map(int, sys.argv[2:]), (True, False)):
        world = World(ranks_per_node=ranks_per_node or None)
        weights, early = run(world, *CASES[name], overlap)
        key = f"{name}/{ranks_per_node}/{overlap}"
        results[key] = weights
        results[key + "/early"] = np.array(max(world.gather_everywhere(early)))
    if world.rank == 0:
        np.savez(sys.argv[1], **results)


def run(world: World, layers: list, shape: tuple, optimizer: dict, training: dict, overlap: bool) -> tuple:
    job = {
        "data": {"train": {"built_in": "digits"}},
        "model": layers,
        "loss": "softmax_cross_entropy",
        "optimizer": optimizer,
        "training": {"seed": 3} | training,
    }
    job = resolve(parse_job(json.dumps(job)))
    model = Model(job.model, job.loss, shape)
    count = model.parameter_count
    decayed = decayed_ranges(model.slots, 0, count)
    exchange = AllReduceExchange(
        world, make_update(job), count, decayed, model.sum_count, job.training.clip_norm, overlap=overlap
    )
    model.attach(exchange.parameters, exchange.gradient, exchange.totals, Reduction(world, exchange.node))
    if exchange.node.rank == 0:
        model.initialize(3)
    exchange.publish_parameters()

    samples = STEPS * BATCH - 7  # the last batch has 3
    random = np.random.default_rng(5)
    features = random.standard_normal((samples, *shape)).astype(np.float32)
    if shape == (6,):
        features = random.integers(0, 40, (samples, *shape)).astype(np.float32)
    dataset = Dataset(features, random.integers(0, 3, samples), None, "drawn")
    accumulator = Accumulator(
        model, exchange.gradient, -(-BATCH // world.size), job.training.micro_batch, exchange.finished
    )
    model.reserve(accumulator.capacity)
    reader = BatchReader(dataset, Preprocessing(), accumulator.capacity)
    meter = Meter()
    for step in range(1, STEPS + 1):
        first, last = (step - 1) * BATCH, min(step * BATCH, samples)
        low, high = share(first, last, world.rank, world.size)
        meter.start_step()
        accumulator.compute(reader, np.arange(low, high), np.arange(0), Moment(3, step, low - first), meter)
        exchange.step(step, last - first, 0.05)
        model.update_state()
    early = exchange.facts().get("buckets_started_in_backward", 0)
    weights = exchange.parameters.copy()
    assert len(set(world.gather_everywhere(float(weights.sum(dtype=np.float64))))) == 1
    exchange.close()
    return weights, early


main()
