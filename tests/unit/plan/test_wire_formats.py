"""What each wire format costs is measured, and its bytes are those that the exchange sends."""

from __future__ import annotations

import pytest

from protos import job_pb2
from protos.rules import resolve, schema_of
from worker.compression.power_sgd import Factors
from worker.engine.params import Parameter, lay_out
from worker.plan.wire_formats import measure_formats
from worker.sync.all_reduce import slice_bounds

SHAPES = ((60, 40), (40,), (40, 10), (10,))
SLOTS = lay_out([(f"{index}.weight", Parameter("weight", shape, 1, 1)) for index, shape in enumerate(SHAPES)])
PARAMETERS = SLOTS[-1].stop


def job(rank: int) -> job_pb2.JobSpec:
    wire_format = job_pb2.WireFormat(power_sgd=job_pb2.PowerSgdFormat(rank=rank))
    return job_pb2.JobSpec(sync=job_pb2.Sync(all_reduce=job_pb2.AllReduceSync(wire_format=wire_format)))


def test_every_format_of_the_job_file_has_bytes_and_seconds() -> None:
    wires = measure_formats(resolve(job_pb2.JobSpec()), SLOTS, 1)
    kinds = schema_of(job_pb2.WireFormat()).oneofs_by_name["kind"].fields
    assert [wire.name for wire in wires] == [kind.name for kind in kinds if kind.name != "float32"]
    for wire in wires:
        assert 0 < wire.bytes_per_element < 4, wire
        assert min(wire.encode_each, wire.decode_each) > 0, wire


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("slices", [1, 3])
def test_power_sgd_sends_the_factors_of_every_slice(rank: int, slices: int) -> None:
    wire = measure_formats(job(rank), SLOTS, slices)[-1]
    sent = [Factors(SLOTS, bounds, rank) for bounds in slice_bounds(PARAMETERS, slices)]
    assert wire.factors == pytest.approx(
        (
            sum(factors.first.size for factors in sent) / PARAMETERS,
            sum(factors.second.size for factors in sent) / PARAMETERS,
        )
    )
    assert wire.bytes_per_element == pytest.approx(4 * sum(wire.factors))
