"""Measures what the cost model needs, on this machine and with this job, in a few seconds.

Forward and backward are those of training on samples of the job's own data, for shares between that of one rank of all
nodes and that of one rank of a node alone; so is the optimizer. MPI and the parameter server run as real processes
that talk over the loopback device: all of an exchange but the network.

Rules: times are those of a machine that nobody disturbs, as far as can be told. Every measurement has its share of the
time and every wait a deadline. Nothing is written but to a temporary folder, and no process is left.
"""

from __future__ import annotations

import math
import os
import secrets
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Final

import numpy as np

from protos import job_pb2
from protos.job_file import to_yaml
from worker.checkpoint import Checkpoint, write_checkpoint
from worker.data.ahead import open_reader
from worker.data.sharding import sample_order, steps_per_epoch
from worker.data.stores import fetch_all
from worker.engine.layers.layer import Moment
from worker.optimizers import CHUNK_ELEMENTS
from worker.plan.machine import Line, Machine, Ready, Workload, fit_line, undisturbed
from worker.preparation import Prepared, check_shares, prepare
from worker.sync.link import measure_across, measure_within, resident_bytes
from worker.update import make_update

COMPUTE_SECONDS: Final = 1.5  # for all shares together
VECTOR_SECONDS: Final = 0.15  # for each of optimizer and sum
SERVER_SECONDS: Final = 0.3  # for each size
SERVER_TIMEOUT_SECONDS: Final = 20.0
MOST_ELEMENTS: Final = 4 << 20  # of a vector that is measured with; beyond, cost is in proportion
FEWEST: Final = 3  # repetitions of anything
MOST: Final = 40


def measure(job: job_pb2.JobSpec, nodes: int, ranks_per_node: int) -> tuple[Machine, Prepared]:
    """Of a rank with the BLAS threads this process has, for plans of up to `nodes`; and the job it was measured with.

    Raises:
        Fault: the data or the model is not usable, there is no mpirun, or something did not end in time.
    """
    bare_bytes = resident_bytes()
    fetch_all(job, lambda: None)
    prepared = prepare(job)
    check_shares(prepared, job, nodes * ranks_per_node)
    work = workload(job, prepared)
    link = measure_across()
    # What MPI adds to a rank, seen on one that holds no data, and what the data adds, seen here.
    base_bytes = resident_bytes() + max(0, link["memory_bytes"] - bare_bytes)
    compute, backward_share, ready = _measure_compute(job, prepared, work, nodes, ranks_per_node)
    cores = len(os.sched_getaffinity(0))
    machine = Machine(
        cores=cores,
        threads=int(os.environ.get("OPENBLAS_NUM_THREADS", "1")),
        compute=compute,
        backward_share=backward_share,
        ready=ready,
        update_each=_measure_update(job, work),
        sum_each=_measure_sum(work),
        fence_seconds=measure_within(ranks_per_node) if ranks_per_node > 1 else 0.0,
        mpi=fit_line(link["bytes"], link["seconds"]),
        grpc=_measure_server(job, work),
        base_memory_bytes=base_bytes,
    )
    return machine, prepared


def workload(job: job_pb2.JobSpec, prepared: Prepared) -> Workload:
    """The job in counts."""
    model, samples = prepared.model, len(prepared.train)
    values = 2 * model.values_per_sample + math.prod(model.sample_shape)
    return Workload(
        parameters=model.parameter_count,
        batch_size=min(job.training.batch_size or samples, samples),
        micro_batch=job.training.micro_batch,
        state_arrays=len(make_update(job).init(0, np.float32)),
        buffer_bytes=4 * values,
        epoch_steps=steps_per_epoch(samples, job.training.batch_size),
    )


def shares_to_measure(batch_size: int, nodes: int, ranks_per_node: int) -> list[int]:
    """A rank's share on all nodes, on one, and one between; on one node alone also halves and quarters."""
    largest = -(-batch_size // ranks_per_node)
    smallest = -(-batch_size // (ranks_per_node * max(nodes, 4)))
    between = math.isqrt(smallest * largest)
    return sorted({smallest, between, largest, -(-batch_size // (ranks_per_node * nodes))})


def runs_of(finished: Sequence[tuple[int, float]], parameters: int) -> tuple[Ready, ...]:
    """The runs of the gradient in the order in which a backward pass finishes them.

    Args:
        finished: from which element on the gradient was finished, and when, in parts of the pass.
    """
    runs, behind = [], parameters
    for first, moment in finished:
        if first < behind:
            runs.append(Ready(behind - first, min(1.0, moment)))
            behind = first
    return tuple(runs)


def _measure_compute(
    job: job_pb2.JobSpec, prepared: Prepared, work: Workload, nodes: int, ranks_per_node: int
) -> tuple[Line, float, tuple[Ready, ...]]:
    """Seconds of a piece over its samples, the part of them that is backward, and what that finishes when."""
    model = prepared.model
    shares = shares_to_measure(work.batch_size, nodes, ranks_per_node)
    pieces = sorted({min(share, work.micro_batch or share) for share in shares})
    model.attach(np.zeros(work.parameters, np.float32), np.zeros(work.parameters, np.float32))
    model.initialize(job.training.seed)
    model.reserve(pieces[-1])
    reader = open_reader(prepared.train, prepared.preprocessing, pieces[-1], prepared.augmentation, ranks_per_node)
    order = sample_order(job.training.seed, 0, len(prepared.train))
    reader.begin_epoch(0)
    taken, backward_shares = [], []
    step = 0
    with np.errstate(over="ignore", invalid="ignore"):
        for samples in pieces:
            whole, backward, passes = [], [], []
            for _ in _repetitions(COMPUTE_SECONDS / len(pieces)):
                step += 1
                began = perf_counter()
                features, targets = reader.take(order[:samples])
                model.forward(features, targets, Moment(job.training.seed, step, 0))
                turned = perf_counter()
                told: list[tuple[int, float]] = []
                model.backward(lambda first, told=told: told.append((first, perf_counter())))  # type: ignore[misc]
                ended = perf_counter()
                passes.append([(first, (when - turned) / (ended - turned)) for first, when in told])
                whole.append(ended - began)
                backward.append(ended - turned)
            taken.append(undisturbed(whole))
            backward_shares.append(undisturbed(backward) / taken[-1])
    reader.close()
    # Of the largest piece, the pass in the middle: what it finished first is a thing of moments.
    middle = sorted(passes, key=lambda finished: finished[0][1])[len(passes) // 2]
    return fit_line(pieces, taken), min(1.0, statistics.median(backward_shares)), runs_of(middle, work.parameters)


def _measure_update(job: job_pb2.JobSpec, work: Workload) -> float:
    """Seconds an element of the optimizer, a cached chunk at a time as the exchange runs it."""
    optimizer = make_update(job)
    elements = min(work.parameters, MOST_ELEMENTS)
    parameters, gradient = np.zeros(elements, np.float32), np.full(elements, 1e-3, np.float32)
    state = optimizer.init(elements, np.float32)

    def update() -> None:
        for low in range(0, elements, CHUNK_ELEMENTS):
            here = slice(low, low + CHUNK_ELEMENTS)
            part = {name: array[here] for name, array in state.items()}
            if optimizer.direct is not None:
                optimizer.direct(parameters[here], gradient[here], part, 1, ())
            optimizer.update(parameters[here], gradient[here], part, 1, 1e-3, ())

    return _seconds(update, VECTOR_SECONDS) / elements


def _measure_sum(work: Workload) -> float:
    """Seconds a byte of adding a vector to another."""
    elements = min(work.parameters, MOST_ELEMENTS)
    total, other = np.zeros(elements, np.float32), np.ones(elements, np.float32)

    def add() -> None:
        for low in range(0, elements, CHUNK_ELEMENTS):
            here = slice(low, low + CHUNK_ELEMENTS)
            np.add(total[here], other[here], out=total[here])

    return _seconds(add, VECTOR_SECONDS) / total.nbytes


def _measure_server(job: job_pb2.JobSpec, work: Workload) -> Line:
    """Seconds of a round trip of one worker, over bytes of the vector."""
    sizes = sorted({min(work.parameters, 1024), min(work.parameters, MOST_ELEMENTS)})
    return fit_line([4 * size for size in sizes], [_round_trip_seconds(job, size) for size in sizes])


def _round_trip_seconds(job: job_pb2.JobSpec, elements: int) -> float:
    plain = job_pb2.JobSpec()
    plain.CopyFrom(job)
    if plain.sync.HasField("parameter_server"):
        plain.sync.parameter_server.ClearField("wire_format")  # coding is measured by itself
    plain.training.reproducible = False  # or virtual shards would be pushed one by one
    # Imported here, as everywhere: gRPC takes a tenth of a second.
    from worker.server.process import start_server_process
    from worker.sync.parameter_server import ParameterServerExchange

    token, digest = secrets.token_urlsafe(32), "0" * 64
    parameters, gradient = np.zeros(elements, np.float32), np.full(elements, 1e-3, np.float32)
    with tempfile.TemporaryDirectory(prefix="paceline-") as folder:
        job_file, start_file = Path(folder) / "job.yaml", Path(folder) / "start.safetensors"
        job_file.write_text(to_yaml(plain))
        write_checkpoint(start_file, Checkpoint(0, 0, 0, digest, [], parameters, {}))
        server = start_server_process(job_file, start_file, 1, 1, token)
        try:
            worker = ParameterServerExchange(
                [server.address], 0, 1, 1, token, digest, parameters, gradient, np.zeros(2),
                timeout_seconds=SERVER_TIMEOUT_SECONDS,
            )  # fmt: skip
            worker.join()
            steps = iter(range(1, MOST + 2))
            taken = _seconds(lambda: worker.step(next(steps), 1, 1e-3), SERVER_SECONDS)
            worker.leave()
        finally:
            server.stop()
    return taken


def _seconds(act: Callable[[], None], budget_seconds: float) -> float:
    taken = []
    for _ in _repetitions(budget_seconds):
        began = perf_counter()
        act()
        taken.append(perf_counter() - began)
    return undisturbed(taken[1:])  # the first touches its memory for the first time


def _repetitions(budget_seconds: float) -> Iterable[int]:
    """Count until the time is used up: at least FEWEST, at most MOST."""
    began = perf_counter()
    for index in range(MOST):
        if index >= FEWEST and perf_counter() - began > budget_seconds:
            return
        yield index
