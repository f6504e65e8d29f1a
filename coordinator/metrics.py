"""What Prometheus reads: the training, jobs and slots series of the contract.

Rules: every figure comes from what workers reported or from the store at the moment of the scrape; a job's series go
once it has been ended for TIME_TO_LIVE, or for its own limits.keep_for. Written as a collector over plain records,
because series that must vanish are then a dictionary entry less. Counters follow the workers' own running totals.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from importlib.metadata import version
from itertools import accumulate
from typing import Literal, TypeAlias

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from coordinator.database import StoreUnavailable
from coordinator.jobs import JobState
from protos import coordinator_pb2, job_pb2

TIME_TO_LIVE = timedelta(minutes=15)
# Upper bounds in seconds: 50 microseconds is a small network's phase, half a minute a huge one's.
STEP_BOUNDS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 30)
RECOVERY_BOUNDS = (0.25, 0.5, 1, 2, 3, 5, 10, 30, 60, 300)
QUEUE_BOUNDS = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 14400, 86400)


class Histogram:
    """Counts by upper bound; plain data, so that it can go with its job."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def buckets(self) -> list[tuple[str, float]]:
        names = [*(str(float(bound)) for bound in self.bounds), "+Inf"]
        return list(zip(names, map(float, accumulate(self.counts)), strict=True))


@dataclass
class _Training:
    """What one job's workers have told so far."""

    newest: job_pb2.Report = field(default_factory=job_pb2.Report)
    phases: dict[str, Histogram] = field(default_factory=dict)
    ranks: dict[int, coordinator_pb2.RankReport] = field(default_factory=dict)
    heartbeats: dict[int, datetime] = field(default_factory=dict)
    expires: datetime | None = None  # once it has ended


_ServerColumn: TypeAlias = Literal[
    "parameter_server_restarts",
    "parameter_server_steps_lost",
    "parameter_server_workers",
    "parameter_server_guests_dropped",
]

# Gauges taken from the newest report that states them: (series, field of Report, what it is).
_GAUGES = (
    ("paceline_train_loss", "loss", "Mean training loss since the report before."),
    ("paceline_validation_loss", "validation_loss", "Loss over the validation set at the last evaluation."),
    ("paceline_validation_accuracy_ratio", "validation_accuracy", "Share of validation labels predicted right."),
    ("paceline_learning_rate", "learning_rate", "Learning rate of the last step."),
    ("paceline_epoch", "epoch", "Epoch of the newest report."),
)
_COUNTERS = (
    ("paceline_samples", "samples", "Samples trained on, over all ranks."),
    ("paceline_steps", "step", "Steps trained, each one global batch."),
)
# Of a job with parameter servers, from rank 0's report: (kind, series, field of RankReport, what it is).
_SERVERS: tuple[tuple[type[CounterMetricFamily | GaugeMetricFamily], str, _ServerColumn, str], ...] = (
    (CounterMetricFamily, "paceline_parameter_server_restarts", "parameter_server_restarts",
     "Parameter servers that died and came back."),
    (CounterMetricFamily, "paceline_parameter_server_steps_lost", "parameter_server_steps_lost",
     "Steps since their snapshots that parameter servers lost when they died."),
    (GaugeMetricFamily, "paceline_parameter_server_workers", "parameter_server_workers",
     "Who shares the next step: nodes and guests."),
    (CounterMetricFamily, "paceline_parameter_server_guests_dropped", "parameter_server_guests_dropped",
     "Guests that were dropped: silent, or their connection lost."),
)  # fmt: skip


class Metrics(Collector):
    """The collector; `jobs_by_state` is asked at each scrape. Threads may call every method."""

    def __init__(
        self,
        slots: int,
        clock: Callable[[], datetime],
        jobs_by_state: Callable[[], Mapping[JobState, int]],
        registry: CollectorRegistry,
    ) -> None:
        self._lock = threading.Lock()
        self._clock = clock
        self._slots = slots
        self._slots_used = 0
        self._training: dict[str, _Training] = {}
        self._queue_wait = Histogram(QUEUE_BOUNDS)
        self._recovery = Histogram(RECOVERY_BOUNDS)
        self._jobs_by_state = jobs_by_state
        registry.register(self)

    # ------------------------------------------------------------------------------------------------------- feeding

    def started(self, waited_seconds: float) -> None:
        with self._lock:
            self._queue_wait.observe(max(waited_seconds, 0.0))

    def recovered(self, seconds: float) -> None:
        with self._lock:
            self._recovery.observe(max(seconds, 0.0))

    def known(self, job_id: str, newest: job_pb2.Report) -> None:
        """What an earlier coordinator was told last. Histograms and the ranks' own counters begin anew."""
        with self._lock:
            training = self._training.setdefault(job_id, _Training())
            training.newest.MergeFrom(newest)
            training.newest.ClearField("phase_seconds")

    def slots_used(self, used: int) -> None:
        with self._lock:
            self._slots_used = used

    def reported(
        self, job_id: str, reports: Iterable[job_pb2.Report], ranks: Iterable[coordinator_pb2.RankReport]
    ) -> None:
        """Take in what a job's workers sent; reports in the order they were made, each once."""
        with self._lock:
            training = self._training.setdefault(job_id, _Training())
            for report in reports:
                steps = report.step - training.newest.step
                if steps < 0:
                    continue  # a restarted job does some steps twice: they count once, and no curve goes back
                if steps > 0:
                    for phase, seconds in report.phase_seconds.items():
                        histogram = training.phases.setdefault(phase, Histogram(STEP_BOUNDS))
                        histogram.observe(seconds / steps, steps)
                training.newest.ClearField("phase_seconds")
                training.newest.MergeFrom(report)  # a field the report leaves out keeps its last value
            for rank in ranks:
                training.ranks[rank.rank] = rank
                training.heartbeats[rank.rank] = self._clock()

    def ended(self, job_id: str, keep_seconds: float = 0) -> None:
        """Start the job's time to live: its own, or where that is 0 the same for all."""
        with self._lock:
            if job_id in self._training:
                keep = timedelta(seconds=keep_seconds) if keep_seconds else TIME_TO_LIVE
                self._training[job_id].expires = self._clock() + keep
            self._expire()

    def _expire(self) -> None:
        now = self._clock()
        for job_id in [key for key, job in self._training.items() if job.expires is not None and job.expires <= now]:
            del self._training[job_id]

    # ------------------------------------------------------------------------------------------------------- reading

    def describe(self) -> Iterable[Metric]:
        return []  # the names do not change, so the registry need not collect to learn them

    def collect(self) -> Iterator[Metric]:
        try:
            by_state = self._jobs_by_state()
        except StoreUnavailable:  # /healthz says so; what is known without the store is still worth a scrape
            by_state = {}
        with self._lock:
            self._expire()
            families = [*self._service(by_state), *self._jobs(), *self._ranks()]
        yield from families

    def _service(self, by_state: Mapping[JobState, int]) -> Iterator[Metric]:
        jobs = GaugeMetricFamily("paceline_jobs", "Jobs in the store, by state.", labels=["state"])
        for state, count in by_state.items():
            jobs.add_metric([state.value], count)
        slots = GaugeMetricFamily("paceline_slots", "Slots of this coordinator, used and free.", labels=["state"])
        slots.add_metric(["used"], self._slots_used)
        slots.add_metric(["free"], self._slots - self._slots_used)
        wait = HistogramMetricFamily("paceline_queue_wait_seconds", "Time from submission to launch.")
        wait.add_metric([], self._queue_wait.buckets(), self._queue_wait.sum)
        recovery = HistogramMetricFamily(
            "paceline_recovery_duration_seconds",
            "Time from the end of a launch that was lost, as the coordinator saw it, to the first step of the next.",
        )
        recovery.add_metric([], self._recovery.buckets(), self._recovery.sum)
        build = InfoMetricFamily("paceline_build", "The program that answers.", value={"version": version("paceline")})
        yield from (jobs, slots, wait, recovery, build)

    def _jobs(self) -> Iterator[Metric]:
        for name, column, text in _GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=["job"])
            for job_id, training in self._training.items():
                newest = training.newest
                if newest.step and (not _optional(column) or newest.HasField(column)):
                    gauge.add_metric([job_id], getattr(newest, column))
            yield gauge
        for name, column, text in _COUNTERS:
            counter = CounterMetricFamily(name, text, labels=["job"])
            for job_id, training in self._training.items():
                counter.add_metric([job_id], getattr(training.newest, column))
            yield counter
        steps = HistogramMetricFamily(
            "paceline_step_duration_seconds",
            "Time a step spent in a phase on rank 0: the mean over the steps between two reports, counted for each.",
            labels=["job", "phase"],
        )
        for job_id, training in self._training.items():
            for phase, histogram in sorted(training.phases.items()):
                steps.add_metric([job_id, phase], histogram.buckets(), histogram.sum)
        yield steps

    def _ranks(self) -> Iterator[Metric]:
        wait = CounterMetricFamily(
            "paceline_exchange_wait_seconds", "Time a rank waited for others in the exchange.", labels=["job", "rank"]
        )
        sent = CounterMetricFamily(
            "paceline_exchange_bytes",
            "Payload of the exchange, summed over the ranks.",
            labels=["job", "transport", "direction"],
        )
        beat = GaugeMetricFamily(
            "paceline_worker_last_heartbeat_timestamp_seconds",
            "When the coordinator last had word of the rank.",
            labels=["job", "rank"],
        )
        saved = GaugeMetricFamily(
            "paceline_checkpoint_last_success_timestamp_seconds",
            "When the job's newest checkpoint was complete.",
            labels=["job"],
        )
        servers = [family(name, text, labels=["job"]) for family, name, _, text in _SERVERS]
        for job_id, training in self._training.items():
            totals: dict[tuple[str, str], int] = {}
            for number, rank in sorted(training.ranks.items()):
                wait.add_metric([job_id, str(number)], rank.exchange_wait_seconds)
                beat.add_metric([job_id, str(number)], training.heartbeats[number].timestamp())
                if rank.HasField("checkpoint_time"):
                    saved.add_metric([job_id], rank.checkpoint_time)
                for series, (_, _, column, _) in zip(servers, _SERVERS, strict=True):
                    if rank.HasField(column):
                        series.add_metric([job_id], getattr(rank, column))
                for direction, by_transport in (("sent", rank.sent_bytes), ("received", rank.received_bytes)):
                    for transport, count in by_transport.items():
                        totals[transport, direction] = totals.get((transport, direction), 0) + count
            for (transport, direction), count in sorted(totals.items()):
                sent.add_metric([job_id, transport, direction], count)
        yield from (wait, sent, beat, saved, *servers)


def _optional(column: str) -> bool:
    return job_pb2.Report.DESCRIPTOR.fields_by_name[column].has_presence
