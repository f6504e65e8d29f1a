"""The table of the slow network, of invented runs."""

import json
from pathlib import Path

from tests.benchmarks.slow_network import CHOICES, FLOAT32, Trained, make_job, make_table, read_run
from worker.__main__ import read_job


def test_what_does_not_reach_the_target_has_no_time_and_points_are_lost_against_float32() -> None:
    runs = {
        FLOAT32: [Trained(20.0, 0.853, 800.0), Trained(30.0, 0.855, 800.0)],
        "fast": [Trained(4.0, 0.850, 4000.0), Trained(5.0, 0.851, 4000.0)],
        "poor": [Trained(4.0, 0.82, 4000.0), Trained(None, 0.70, 4000.0)],
    }
    base, fast, poor = make_table(runs, 0.82).rows
    assert base[2:] == ("25.0 [20.0 .. 30.0]", "1.00", "85.40 [85.30 .. 85.50]", "+0.00")
    assert fast[3:] == ("5.50 [5.00 .. 6.00]", "85.05 [85.00 .. 85.10]", "+0.35")
    assert poor[2:4] == ("-", "-")


def test_the_time_is_that_of_the_first_epoch_with_the_accuracy(tmp_path: Path) -> None:
    lines = [
        {"wall_seconds": 1.0, "loss": 2.0},
        {"wall_seconds": 2.0, "validation_accuracy": 0.5},
        {"wall_seconds": 3.0, "validation_accuracy": 0.83},
        {"wall_seconds": 4.0, "validation_accuracy": 0.81},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "summary.json").write_text(json.dumps({"samples_per_second": 7.0}))
    assert read_run(tmp_path, 0.82) == Trained(3.0, 0.81, 7.0)
    assert read_run(tmp_path, 0.9) == Trained(None, 0.81, 7.0)


def test_every_choice_is_a_job_that_the_rules_allow(tmp_path: Path) -> None:
    for name, sync in CHOICES.items():
        job = tmp_path / "job.json"
        job.write_text(json.dumps(make_job(sync, 1, tmp_path)))
        assert read_job(job).sync.WhichOneof("kind"), name
