"""What ranks may say they measured, and what they may not."""

import pytest

from coordinator.measured import fault_of
from protos import coordinator_pb2 as pb
from protos import job_pb2


def with_metric(value: object) -> job_pb2.Report:
    report = job_pb2.Report(step=3)
    report.validation_metrics.update({"m": value})
    return report


def test_what_a_rank_measures_is_taken() -> None:
    phases = ("data", "forward", "backward", "exchange", "update", "evaluate", "checkpoint")
    report = job_pb2.Report(step=3, loss=float("nan"), phase_seconds=dict.fromkeys(phases, 0.1))
    rank = pb.RankReport(rank=1, host="here", sent_bytes={"mpi": 5, "grpc": 0}, checkpoint_time=1.7e9)
    assert fault_of([report], [rank]) is None


@pytest.mark.parametrize("value", [0.5, [0.5, 1, 0], [[1, 2], [3, 4]], [None, 0.5], [], [[0] * 300] * 300])
def test_a_metric_is_a_number_a_list_or_a_matrix(value: object) -> None:
    assert fault_of([with_metric(value)], []) is None


@pytest.mark.parametrize("value", ["text", {"a": 1}, [[[1]]], [{}], True])
def test_anything_else_is_no_metric(value: object) -> None:
    assert fault_of([with_metric(value)], []) == (
        "report of step 3: validation_metrics: a metric is a number, a list of numbers or a matrix"
    )


@pytest.mark.parametrize(
    ("rank", "fault"),
    [
        (pb.RankReport(rank=1, sent_bytes={"mpi": -1}), "rank 1: sent_bytes: -1 is not a finite number of at least 0"),
        (pb.RankReport(rank=1, host="h" * 256), "rank 1: host is longer than 255 characters"),
        (
            pb.RankReport(checkpoint_time=float("inf")),
            "rank 0: checkpoint_time: inf is not a finite number of at least 0",
        ),
        (
            pb.RankReport(received_bytes={str(n): 1 for n in range(17)}),
            "rank 0: received_bytes has 17 names, which is not at most 16",
        ),
    ],
)
def test_what_no_rank_measures_is_one_line(rank: pb.RankReport, fault: str) -> None:
    assert fault_of([], [rank]) == fault
