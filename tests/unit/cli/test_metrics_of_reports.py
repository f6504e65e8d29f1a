"""Metrics of an evaluation keep their form on the way from a worker's report to what `paceline metrics` prints."""

import json

from google.protobuf import json_format

from coordinator.presentation import json_line
from protos import job_pb2


def test_numbers_lists_and_matrices_come_out_as_they_went_in() -> None:
    metrics = {"f1": 0.5, "f1_per_class": [0.25, 0.75], "confusion_matrix": [[3, 1], [0, 2]]}
    report = json_format.ParseDict({"step": 7, "validation_metrics": metrics}, job_pb2.Report())
    again = job_pb2.Report.FromString(report.SerializeToString())
    assert json.loads(json_line(again))["validation_metrics"] == metrics
    assert "validation_metrics" not in json.loads(json_line(job_pb2.Report(step=7)))
