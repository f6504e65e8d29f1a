"""The Prometheus page, parsed as Prometheus would."""

import math
from collections.abc import Callable
from datetime import timedelta

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from coordinator.jobs import JobState
from coordinator.metrics import TIME_TO_LIVE, Metrics
from protos import coordinator_pb2, job_pb2


class Clock:
    def __init__(self, now) -> None:
        self.now = now

    def __call__(self):
        return self.now


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def clock(noon) -> Clock:
    return Clock(noon)


@pytest.fixture
def metrics(registry, clock) -> Metrics:
    return Metrics(4, clock, lambda: {**dict.fromkeys(JobState, 0), JobState.RUNNING: 2}, registry)


@pytest.fixture
def page(registry) -> Callable[[], dict[str, float]]:
    """Each sample of the page by its name and labels, spelled as Prometheus spells them."""

    def read() -> dict[str, float]:
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(generate_latest(registry).decode()):
            for sample in family.samples:
                labels = ",".join(f'{key}="{value}"' for key, value in sorted(sample.labels.items()))
                name = f"{sample.name}{{{labels}}}" if labels else sample.name
                assert name not in found
                found[name] = sample.value
        return found

    return read


def report(step: int, **fields: object) -> job_pb2.Report:
    return job_pb2.Report(step=step, samples=step * 32, epoch=1, learning_rate=0.01, **fields)


def test_parameter_servers_are_shown_for_the_jobs_that_have_some(metrics, page) -> None:
    told = {"parameter_server_restarts": 2, "parameter_server_steps_lost": 30, "parameter_server_workers": 5}
    told |= {"parameter_server_guests_dropped": 3}
    metrics.reported(
        "a-1", [report(10)], [coordinator_pb2.RankReport(rank=0, **told), coordinator_pb2.RankReport(rank=1)]
    )
    metrics.reported("b-1", [report(10)], [coordinator_pb2.RankReport(rank=0)])
    shown = {name: value for name, value in page().items() if name.startswith("paceline_parameter_server")}
    assert shown == {
        'paceline_parameter_server_guests_dropped_total{job="a-1"}': 3,
        'paceline_parameter_server_restarts_total{job="a-1"}': 2,
        'paceline_parameter_server_steps_lost_total{job="a-1"}': 30,
        'paceline_parameter_server_workers{job="a-1"}': 5,
    }


def test_what_is_reported_is_what_is_shown(metrics, page, noon) -> None:
    ranks = [
        coordinator_pb2.RankReport(
            rank=rank, exchange_wait_seconds=0.5 + rank, sent_bytes={"mpi": 10}, received_bytes={"mpi": 20, "grpc": 5}
        )
        for rank in (0, 1)
    ]
    ranks[0].checkpoint_time = 1_700_000_000.5
    metrics.reported("a-1", [report(10, loss=2.0), report(20, loss=1.5)], ranks)
    shown = page()
    assert shown['paceline_train_loss{job="a-1"}'] == 1.5
    assert shown['paceline_steps_total{job="a-1"}'] == 20
    assert shown['paceline_samples_total{job="a-1"}'] == 640
    assert shown['paceline_learning_rate{job="a-1"}'] == 0.01
    assert shown['paceline_epoch{job="a-1"}'] == 1
    assert shown['paceline_exchange_wait_seconds_total{job="a-1",rank="1"}'] == 1.5
    assert shown['paceline_exchange_bytes_total{direction="sent",job="a-1",transport="mpi"}'] == 20
    assert shown['paceline_exchange_bytes_total{direction="received",job="a-1",transport="grpc"}'] == 10
    assert shown['paceline_worker_last_heartbeat_timestamp_seconds{job="a-1",rank="0"}'] == noon.timestamp()
    assert shown['paceline_checkpoint_last_success_timestamp_seconds{job="a-1"}'] == 1_700_000_000.5
    assert 'paceline_validation_loss{job="a-1"}' not in shown


def test_a_validation_figure_stays_until_the_next_one(metrics, page) -> None:
    metrics.reported("a-1", [report(10, loss=2.0, validation_loss=1.0, validation_accuracy=0.5)], [])
    metrics.reported("a-1", [report(20, loss=1.0)], [])
    shown = page()
    assert shown['paceline_validation_loss{job="a-1"}'] == 1.0
    assert shown['paceline_validation_accuracy_ratio{job="a-1"}'] == 0.5
    assert shown['paceline_train_loss{job="a-1"}'] == 1.0


def test_the_step_histogram_counts_each_step_at_the_mean_of_its_report(metrics, page) -> None:
    metrics.reported("a-1", [report(10, phase_seconds={"forward": 0.02}), report(30, phase_seconds={"forward": 2})], [])
    metrics.reported("a-1", [report(30, validation_loss=1.0)], [])
    shown = page()
    name, labels = "paceline_step_duration_seconds", 'job="a-1"'
    assert shown[f'{name}_count{{{labels},phase="forward"}}'] == 30
    assert shown[f'{name}_sum{{{labels},phase="forward"}}'] == pytest.approx(2.02)
    assert shown[f'{name}_bucket{{{labels},le="0.001",phase="forward"}}'] == 0
    assert shown[f'{name}_bucket{{{labels},le="0.0025",phase="forward"}}'] == 10  # 0.02 s over 10 steps
    assert shown[f'{name}_bucket{{{labels},le="0.1",phase="forward"}}'] == 30  # 2 s over 20 steps, on the bound
    assert shown[f'{name}_bucket{{{labels},le="+Inf",phase="forward"}}'] == 30


def test_jobs_slots_queue_and_build_are_there_without_any_job(metrics, page) -> None:
    metrics.slots_used(3)
    metrics.started(waited_seconds=20)
    shown = page()
    assert {name for name in shown if name.startswith("paceline_jobs")} == {
        f'paceline_jobs{{state="{state}"}}' for state in JobState
    }
    assert shown['paceline_jobs{state="RUNNING"}'] == 2
    assert (shown['paceline_slots{state="used"}'], shown['paceline_slots{state="free"}']) == (3, 1)
    assert shown['paceline_queue_wait_seconds_bucket{le="15.0"}'] == 0
    assert shown['paceline_queue_wait_seconds_bucket{le="60.0"}'] == 1
    assert shown["paceline_queue_wait_seconds_sum"] == 20
    assert any(name.startswith("paceline_build_info{version=") for name in shown)


def test_what_a_restarted_job_does_twice_counts_once_and_no_curve_goes_back(metrics, page) -> None:
    metrics.reported("digits-1", [report(10, loss=0.5)], [])
    metrics.reported("digits-1", [report(7, loss=0.9)], [])
    assert page()['paceline_steps_total{job="digits-1"}'] == 10
    assert page()['paceline_train_loss{job="digits-1"}'] == 0.5
    metrics.reported("digits-1", [report(12, loss=0.4)], [])
    assert page()['paceline_samples_total{job="digits-1"}'] == 12 * 32


def test_a_recovery_is_counted_by_its_duration(metrics, page) -> None:
    metrics.recovered(1.5)
    found = page()
    assert found["paceline_recovery_duration_seconds_count"] == 1
    assert found["paceline_recovery_duration_seconds_sum"] == 1.5
    assert found['paceline_recovery_duration_seconds_bucket{le="1.0"}'] == 0
    assert found['paceline_recovery_duration_seconds_bucket{le="2.0"}'] == 1


def test_what_an_earlier_coordinator_was_told_last_is_shown_and_not_counted_as_steps_of_now(metrics, page) -> None:
    metrics.known("digits-1", report(10, loss=0.5, phase_seconds={"forward": 0.1}))
    found = page()
    assert found['paceline_steps_total{job="digits-1"}'] == 10
    assert found['paceline_train_loss{job="digits-1"}'] == 0.5
    assert not any(name.startswith("paceline_step_duration_seconds") for name in found)


def test_a_jobs_series_go_when_its_time_to_live_is_over_and_others_stay(metrics, page, clock) -> None:
    for job in ("a-1", "b-2"):
        metrics.reported(job, [report(1, loss=1.0)], [coordinator_pb2.RankReport(rank=0)])
    metrics.ended("a-1")
    metrics.ended("never-reported")
    clock.now += TIME_TO_LIVE - timedelta(seconds=1)
    assert any('job="a-1"' in name for name in page())
    clock.now += timedelta(seconds=1)
    shown = page()
    assert not any('job="a-1"' in name for name in shown)
    assert shown['paceline_train_loss{job="b-2"}'] == 1.0


def test_a_loss_that_is_not_finite_is_shown_as_it_is(metrics, page) -> None:
    metrics.reported("a-1", [report(1, loss=math.inf)], [])
    assert page()['paceline_train_loss{job="a-1"}'] == math.inf


def test_the_page_is_also_valid_openmetrics(metrics, registry) -> None:
    metrics.reported("a-1", [report(1, loss=1.0, phase_seconds={"data": 0.1})], [coordinator_pb2.RankReport(rank=0)])
    families = {family.name: family.type for family in parse_openmetrics(generate_openmetrics(registry).decode())}
    assert families["paceline_samples"] == "counter"
    assert families["paceline_step_duration_seconds"] == "histogram"
    assert all(name.startswith("paceline_") for name in families)
