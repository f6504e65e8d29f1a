"""The matrix products of one training step, alone: what a step could not be faster than.

Run as `python FILE JOB [--seconds S]` with one BLAS thread. Prints a JSON line: the median seconds of one step's
products, their floating-point operations, how many they are.

Rules: the products are those the engine asks NumPy for, on the same arrays, in the same order: one step is done with
np.matmul and np.dot replaced by recorders, and what they saw is done again and again. A product of matrices counts, one
of a matrix and a vector (a bias's gradient, a sum) does not. The engine knows nothing of this.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from protos import job_pb2
from protos.job_file import read_job_file
from worker.data.batches import BatchReader
from worker.engine.layers.layer import Moment
from worker.engine.model import Model
from worker.preparation import prepare

LEAST_REPEATS = 5


class Product(NamedTuple):
    """One call, with the arrays it was made with."""

    function: Callable[..., Any]
    left: np.ndarray
    right: np.ndarray
    out: np.ndarray | None

    @property
    def flop(self) -> int:
        """A multiplication and an addition for each pair of elements that meet."""
        rows = np.broadcast_shapes(self.left.shape[:-2], self.right.shape[:-2])
        return 2 * int(np.prod(rows)) * self.left.shape[-2] * self.left.shape[-1] * self.right.shape[-1]


@contextmanager
def recording() -> Iterator[list[Product]]:
    """Collects the products of matrices that are done meanwhile."""
    products: list[Product] = []
    functions = {"matmul": np.matmul, "dot": np.dot}

    def recorder(function: Callable[..., Any]) -> Callable[..., Any]:
        def record(left: Any, right: Any, out: Any = None) -> Any:
            if min(np.ndim(left), np.ndim(right)) >= 2:
                products.append(Product(function, left, right, out))
            return function(left, right, out=out)

        return record

    for name, function in functions.items():
        setattr(np, name, recorder(function))
    try:
        yield products
    finally:
        for name, function in functions.items():
            setattr(np, name, function)


def record_step(job: job_pb2.JobSpec) -> tuple[Model, list[Product]]:
    """The products of one step of one rank; the model is kept for its arrays."""
    prepared = prepare(job)
    model, batch_size = prepared.model, job.training.batch_size
    parameters, gradient = (np.zeros(model.parameter_count, model.dtype) for _ in range(2))
    model.attach(parameters, gradient)
    model.initialize(job.training.seed)
    model.reserve(batch_size)
    features, targets = BatchReader(prepared.train, prepared.preprocessing, batch_size).take(np.arange(batch_size))
    with recording() as products:
        model.forward(features, targets, Moment(job.training.seed, 1, 0))
        model.backward()
    return model, products


def time_products(products: Sequence[Product], seconds: float) -> float:
    """The median seconds of all of them, one behind the other."""
    calls = [(product.function, product.left, product.right, product.out) for product in products]
    taken: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(taken) < LEAST_REPEATS or time.perf_counter() < deadline:
        began = time.perf_counter()
        for function, left, right, out in calls:
            function(left, right, out=out)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", type=Path)
    parser.add_argument("--seconds", type=float, default=1.5)
    arguments = parser.parse_args()
    _model, products = record_step(read_job_file(arguments.job))
    flop = sum(product.flop for product in products)
    print(json.dumps({"seconds": time_products(products, arguments.seconds), "flop": flop, "products": len(products)}))


if __name__ == "__main__":
    main()
