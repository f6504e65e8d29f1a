"""What the ranks of a job may say they measured.

Rules: a report is shown to everyone who sees the job and stays in the store, so one that is no report is refused whole:
too large or too deep for the answers it would have to travel in, of more series than Prometheus should be made to keep,
or of numbers that no rank measures. A loss may be anything: it is what the job came to.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

from google.protobuf.struct_pb2 import Struct, Value

from protos import coordinator_pb2, job_pb2

REPORT_BYTES_AT_MOST = 3 << 19  # a confusion matrix of 300 classes; a job's answer holds two
NAMES_AT_MOST = 16  # phases of a step, or transports
NAME_AT_MOST = 64  # characters
HOST_AT_MOST = 255  # characters, as in the domain name system
DIMENSIONS_AT_MOST = 2  # of a metric: a number, a list or a matrix


def fault_of(reports: Iterable[job_pb2.Report], ranks: Iterable[coordinator_pb2.RankReport]) -> str | None:
    """What is wrong with the first that cannot be taken; None where all can."""
    faults = [*map(_report_faults, reports), *map(_rank_faults, ranks)]
    return next((fault for found in faults for fault in found), None)


def _report_faults(report: job_pb2.Report) -> Iterator[str]:
    place = f"report of step {report.step}: "
    if report.step < 0:
        yield f"{place}step is below 0"
    if (size := report.ByteSize()) > REPORT_BYTES_AT_MOST:
        yield f"{place}takes {size} bytes, which is not at most {REPORT_BYTES_AT_MOST}"
    yield from _map_faults(f"{place}phase_seconds", report.phase_seconds)
    yield from _metric_faults(place, report.validation_metrics)


def _rank_faults(rank: coordinator_pb2.RankReport) -> Iterator[str]:
    place = f"rank {rank.rank}: "
    if len(rank.host) > HOST_AT_MOST:
        yield f"{place}host is longer than {HOST_AT_MOST} characters"
    yield from _map_faults(f"{place}sent_bytes", rank.sent_bytes)
    yield from _map_faults(f"{place}received_bytes", rank.received_bytes)
    for field, value in rank.ListFields():
        if isinstance(value, int | float) and not (math.isfinite(value) and value >= 0):
            yield f"{place}{field.name}: {value} is not a finite number of at least 0"


def _map_faults(place: str, numbers: Mapping[str, float]) -> Iterator[str]:
    if len(numbers) > NAMES_AT_MOST:
        yield f"{place} has {len(numbers)} names, which is not at most {NAMES_AT_MOST}"
        return
    for name, value in numbers.items():
        if len(name) > NAME_AT_MOST:
            yield f"{place}: a name is longer than {NAME_AT_MOST} characters"
        if not (math.isfinite(value) and value >= 0):
            yield f"{place}: {value} is not a finite number of at least 0"


def _metric_faults(place: str, metrics: Struct) -> Iterator[str]:
    for value in metrics.fields.values():
        if not _is_metric(value, DIMENSIONS_AT_MOST):
            yield f"{place}validation_metrics: a metric is a number, a list of numbers or a matrix"


def _is_metric(value: Value, dimensions: int) -> bool:
    kind = value.WhichOneof("kind")
    if kind == "list_value" and dimensions:
        return all(_is_metric(part, dimensions - 1) for part in value.list_value.values)
    return kind in ("number_value", "null_value")
