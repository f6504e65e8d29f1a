"""A machine and a job whose costs can be worked out by hand."""

from __future__ import annotations

import pytest

from worker.plan.machine import Line, Machine, Ready, Workload
from worker.plan.network import PAYLOAD_SHARE, Cluster


@pytest.fixture
def machine() -> Machine:
    return Machine(
        cores=2,
        threads=1,
        compute=Line(0.001, 0.0001),
        backward_share=0.5,
        ready=(Ready(250_000, 0.25), Ready(750_000, 1.0)),
        update_each=1e-9,
        sum_each=1e-10,
        fence_seconds=1e-6,
        mpi=Line(1e-5, 1e-10),
        grpc=Line(3e-4, 1e-9),
        base_memory_bytes=50_000_000,
    )


@pytest.fixture
def work() -> Workload:
    """4 MB of gradient, 400 samples a step."""
    return Workload(
        parameters=1_000_000, batch_size=400, micro_batch=0, state_arrays=2, buffer_bytes=1000, epoch_steps=1000
    )


@pytest.fixture
def cluster() -> Cluster:
    """Four nodes of a rank; a link carries 10 MB of payload a second each way."""
    return Cluster(nodes=4, ranks_per_node=1, bytes_per_second=10e6 / PAYLOAD_SHARE, latency_seconds=1e-4)
