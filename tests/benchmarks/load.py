"""A coordinator under load: many jobs in its store, many watchers, many clients at once; beside an empty call.

Rules: the coordinator is a process of its own with SQLite in a folder, each commit on disk before it answers. The empty
call is Check of grpc.health on the same server. One client asks, one call after the other, the kinds taking turns, so
that a ratio compares calls made under the same conditions; then many submit at once, and every job that was
acknowledged must be in the store.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from coordinator import jobs
from coordinator.database import sqlite_at
from coordinator.store import Store
from protos import coordinator_pb2 as pb
from protos import coordinator_pb2_grpc, job_pb2
from protos.job_file import parse_job
from protos.rules import resolve
from tests.benchmarks.measurement import BenchmarkFailed
from tests.benchmarks.section import Section, Setting
from tests.benchmarks.table import Table
from tests.mpi.mpirun import PROJECT

JOBS, WATCHERS, CLIENTS, CALLS = 10_000, 200, 100, 500
QUICK = (200, 20, 10, 20)
DEADLINE_SECONDS = 120.0
EMPTY, GET, LIST, SUBMIT = "empty call", "GetJob", "ListJobs, 100 jobs", "SubmitJob"
TARGETS = {GET: "at most 3", SUBMIT: "at most 6"}
SERVER = PROJECT / "tests" / "contract" / "coordinator" / "serve_fake.py"
JOB = """{name: NAME, data: {train: {built_in: digits}}, model: [{dense: {units: 10}}], loss: softmax_cross_entropy,
          optimizer: sgd}"""
CAPTION = """\
A coordinator with {jobs:,} jobs in its SQLite store and {watchers} watchers of one that waits. Milliseconds a call of
one client, {calls} of each kind in turns; the ratio is that of the medians. {clients} clients at once submitted
{many:,} jobs in {seconds:.1f} s, {rate:.0f} a second; {found:,} of them are in the store. The coordinator then holds
{megabytes:.0f} MB."""


def run(setting: Setting) -> Section:
    """Fill a store, serve it, and ask. Raises BenchmarkFailed."""
    count, watchers, clients, calls = QUICK if setting.quick else (JOBS, WATCHERS, CLIENTS, CALLS)
    state = setting.scratch / "load"
    fill(state, count)
    with coordinator(state) as (address, process), grpc.insecure_channel(address) as channel:
        stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
        for name in ("long", "waits"):  # to fake_mpirun.py the first says that it never ends
            watched = stub.SubmitJob(pb.SubmitJobRequest(spec=job(name)), timeout=DEADLINE_SECONDS).job.id
        watches = [
            stub.WatchJob(pb.WatchJobRequest(job_id=watched), timeout=10 * DEADLINE_SECONDS) for _ in range(watchers)
        ]
        for watch in watches:
            next(watch)
        seconds = take_turns(kinds(channel, watched), calls)
        setting.say(f"load: {calls} calls of each kind, {watchers} watchers")
        began = time.monotonic()
        made = submit_at_once(address, clients, calls // 10)
        took = time.monotonic() - began
        found = len(made & listed(stub))
        megabytes = resident_bytes(process.pid) / 2**20
        for watch in watches:
            watch.cancel()
    if found < len(made):
        raise BenchmarkFailed(f"{len(made)} jobs were acknowledged and {found} of them are in the list")
    many = len(made)
    caption = CAPTION.format(
        jobs=count, watchers=watchers, calls=calls, clients=clients, many=many, seconds=took, rate=many / took,
        found=found, megabytes=megabytes,
    )  # fmt: skip
    return Section((load_table(seconds),), caption)


def job(name: str = "load") -> job_pb2.JobSpec:
    return parse_job(JOB.replace("NAME", name))


def load_table(seconds: dict[str, Sequence[float]]) -> Table:
    """A row for each kind of call, with its ratio to the empty one."""
    floor = median(seconds[EMPTY])
    rows = []
    for kind, measured in seconds.items():
        middle, late = median(measured), quantiles(measured, n=100)[98]
        ratio = "" if kind == EMPTY else f"{middle / floor:.1f}"
        rows.append((kind, f"{1e3 * middle:.2f}", f"{1e3 * late:.2f}", ratio, TARGETS.get(kind, "")))
    return Table(("call", "p50 ms", "p99 ms", "times the empty call", "wanted"), rows)


def fill(state: Path, count: int) -> None:
    """A store of jobs that have ended."""
    state.mkdir(mode=0o700)
    store = Store(sqlite_at(state / "paceline.sqlite"))
    spec, now = resolve(job()), datetime.now(UTC)
    ended = jobs.advance(jobs.submitted("load-000000", spec, now), jobs.CancelAsked(), now)
    for number in range(count):
        store.add(replace(ended, id=f"load-{number:06d}"))
    store.close()


@contextmanager
def coordinator(state: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """One with a slot, which its first job never gives back: the others wait."""
    launcher = state.parent / "mpirun"
    launcher.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{SERVER.with_name("fake_mpirun.py")}" "$@"\n')
    launcher.chmod(0o755)
    command = [sys.executable, str(SERVER), str(launcher), "127.0.0.1:0", "127.0.0.1:0", str(state), "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=PROJECT)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if "ready: grpc " not in line:
            raise BenchmarkFailed(f"the coordinator does not start: {line!r}")
        yield line.partition("ready: grpc ")[2].partition(",")[0], process
    finally:
        process.kill()
        process.communicate()


def kinds(channel: grpc.Channel, job_id: str) -> dict[str, Callable[[], object]]:
    stub, health = coordinator_pb2_grpc.CoordinatorServiceStub(channel), health_pb2_grpc.HealthStub(channel)
    submission = pb.SubmitJobRequest(spec=job())
    return {
        EMPTY: lambda: health.Check(health_pb2.HealthCheckRequest(), timeout=DEADLINE_SECONDS),
        GET: lambda: stub.GetJob(pb.GetJobRequest(job_id=job_id), timeout=DEADLINE_SECONDS),
        LIST: lambda: stub.ListJobs(pb.ListJobsRequest(), timeout=DEADLINE_SECONDS),
        SUBMIT: lambda: stub.SubmitJob(submission, timeout=DEADLINE_SECONDS),
    }


def take_turns(asked: dict[str, Callable[[], object]], calls: int) -> dict[str, Sequence[float]]:
    """Seconds of each call."""
    seconds: dict[str, list[float]] = {kind: [] for kind in asked}
    for number in range(calls + 5):
        for kind, call in asked.items():
            began = time.perf_counter()
            call()
            if number >= 5:  # the first open connections and fill caches
                seconds[kind].append(time.perf_counter() - began)
    return dict(seconds)


def submit_at_once(address: str, clients: int, each: int) -> set[str]:
    """The ids that so many clients, each with a connection of its own, were given."""

    def client(number: int) -> list[str]:
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(address, options) as channel:
            stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
            requests = (pb.SubmitJobRequest(spec=job(), request_id=f"{number}-{n}") for n in range(each))
            return [stub.SubmitJob(request, timeout=DEADLINE_SECONDS).job.id for request in requests]

    with ThreadPoolExecutor(clients) as pool:
        return {job_id for ids in pool.map(client, range(clients)) for job_id in ids}


def listed(stub: coordinator_pb2_grpc.CoordinatorServiceStub) -> set[str]:
    found: set[str] = set()
    token = ""
    while True:
        request = pb.ListJobsRequest(page_size=1000, page_token=token)
        page = stub.ListJobs(request, timeout=DEADLINE_SECONDS)
        found |= {job.id for job in page.jobs if job.state == job_pb2.JOB_STATE_QUEUED}
        token = page.next_page_token
        if not token:
            return found


def resident_bytes(pid: int) -> int:
    return int((Path("/proc") / str(pid) / "statm").read_text().split()[1]) * 4096
