"""A coordinator for those who mean harm, and what they do to it: calls with anything in them, bytes on its ports.

Each deed returns its outcome, a word and what was said: a gRPC status code or an HTTP status, and the message.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import grpc
from google.protobuf.message import Message

from coordinator.addresses import Address
from coordinator.serve import SERVICE_NAME, Coordinator, Settings, running
from coordinator.tokens import Role
from protos import coordinator_pb2 as pb
from protos import job_pb2
from protos.job_file import parse_job

DEADLINE_SECONDS = 60
STREAMS = ("WatchJob", "StreamLogs", "PullArtifacts")
JOB = """{name: NAME, data: {train: {built_in: digits}}, model: [{dense: {units: 10}}], loss: softmax_cross_entropy,
          optimizer: sgd}"""
ROLES = {"ada": Role.SUBMITTER, "bob": Role.SUBMITTER, "viewer": Role.VIEWER, "root": Role.ADMINISTRATOR}
UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_metadata_size", 1 << 20)]


class Outcome(NamedTuple):
    word: str
    said: str


class World:
    """Its jobs are ada's: one that runs, one that has ended. Every caller needs a token."""

    def __init__(self, coordinator: Coordinator, channel: grpc.Channel, folder: Path) -> None:
        self.coordinator, self.channel, self.folder = coordinator, channel, folder
        now = datetime.now(UTC)
        tokens = coordinator.tokens
        secrets = {name: tokens.create(name, role, None, now) for name, role in ROLES.items()}
        secrets["revoked"] = tokens.create("revoked", Role.ADMINISTRATOR, None, now)
        tokens.revoke("revoked", now)
        secrets["expired"] = tokens.create("expired", Role.ADMINISTRATOR, now, now - timedelta(hours=1))
        self.secrets = secrets
        deadline = time.monotonic() + DEADLINE_SECONDS
        while self.call("ListJobs", pb.ListJobsRequest(), "").word != "UNAUTHENTICATED":
            assert time.monotonic() < deadline, "the tokens do not count"
            time.sleep(0.05)
        self.running = self.submit("long", job_pb2.JOB_STATE_RUNNING)
        self.secrets["worker"] = token_of(self.running)
        self.ended = self.submit("good", job_pb2.JOB_STATE_SUCCEEDED, request_id="once")
        self.before = self.jobs()

    def submit(self, name: str, state: job_pb2.JobState, **options: str) -> str:
        """A job of ada's, once it has come so far."""
        request = pb.SubmitJobRequest(spec=spec(name), **options)
        job = pb.SubmitJobResponse.FromString(self.send("SubmitJob", request, "ada")).job
        for event in self.send("WatchJob", pb.WatchJobRequest(job_id=job.id), "ada"):
            if pb.WatchJobResponse.FromString(event).job.state == state:
                return job.id
        raise AssertionError(f"{name} ended first")

    def jobs(self) -> list[tuple[str, int, int]]:
        """What a caller sees that means no harm."""
        listed = pb.ListJobsResponse.FromString(self.send("ListJobs", pb.ListJobsRequest(), "root"))
        return [(job.id, job.state, job.progress.step) for job in listed.jobs]

    def send(self, name: str, request: Message | bytes, who: str, headers: Iterable[tuple[str, str]] = ()) -> Any:
        """The answer as bytes; of a stream the call."""
        path = name if "/" in name else f"/{SERVICE_NAME}/{name}"
        kind = self.channel.unary_stream if name in STREAMS else self.channel.unary_unary
        token = (("authorization", f"Bearer {self.secrets[who]}"),) if who else ()
        content = request if isinstance(request, bytes) else request.SerializeToString()
        return kind(path)(content, metadata=(*token, *headers), timeout=DEADLINE_SECONDS)

    def call(
        self, name: str, request: Message | bytes, who: str = "root", headers: Iterable[tuple[str, str]] = ()
    ) -> Outcome:
        try:
            answer = self.send(name, request, who, headers)
            if name in STREAMS:
                list(answer)
        except grpc.RpcError as error:
            return Outcome(error.code().name, error.details())
        return Outcome("OK", "")

    @contextmanager
    def connection(self, port: int) -> Iterator[socket.socket]:
        with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_SECONDS) as opened:
            yield opened

    def http(self, sent: bytes) -> Outcome:
        """What the HTTP port says to these bytes: its status, and what is behind its head."""
        with self.connection(self.coordinator.http.port) as opened:
            opened.sendall(sent)
            opened.shutdown(socket.SHUT_WR)
            with opened.makefile("rb") as answer:
                head, _, body = answer.read().partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/"):  # to a caller of HTTP 0.9 nothing is said but the text
            return Outcome("no status", head.decode())
        return Outcome(head.split(maxsplit=2)[1].decode(), body.decode())


Deed = Callable[[World], Outcome]


@contextmanager
def world_in(folder: Path, fake_mpirun: str) -> Iterator[World]:
    free = Address("127.0.0.1", 0)
    roots = folder / "data"
    roots.mkdir()
    settings = Settings(free, free, folder / "state", (roots,), 2, fake_mpirun, "paceline-worker", grace_seconds=1.0)
    with running(settings) as coordinator, grpc.insecure_channel(str(coordinator.grpc_address), UNLIMITED) as channel:
        yield World(coordinator, channel, roots)


def spec(name: str = "good") -> job_pb2.JobSpec:
    return parse_job(JOB.replace("NAME", name))


def token_of(job_id: str) -> str:
    """The token of a job's process, as its own user finds it."""
    for entry in Path("/proc").iterdir():
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"PACELINE_JOB_ID={job_id}".encode() in variables:
            (found,) = [value for value in variables if value.startswith(b"PACELINE_JOB_TOKEN=")]
            return found.partition(b"=")[2].decode()
    raise AssertionError(f"no process of {job_id}")


# -------------------------------------------------------------------------------------------------------------- deeds


def call(name: str, request: Message | bytes, who: str = "root", **header: str) -> Deed:
    return lambda world: world.call(name, request, who, header.items())


def submit(change: Callable[[job_pb2.JobSpec], object], **options: str) -> Deed:
    """Submit a good job with one thing changed."""

    def act(world: World) -> Outcome:
        changed = spec()
        change(changed)
        return world.call("SubmitJob", pb.SubmitJobRequest(spec=changed, **options), "ada")

    return act


def reads(path: str) -> Deed:
    """Submit a job that trains on this; FOLDER stands for the data root."""

    def act(world: World) -> Outcome:
        changed = spec()
        changed.data.train.npz.path = path.replace("FOLDER", str(world.folder))
        return world.call("SubmitJob", pb.SubmitJobRequest(spec=changed), "ada")

    return act


def of_running(name: str, kind: type[Message], who: str = "root", **fields: object) -> Deed:
    return lambda world: world.call(name, kind(job_id=world.running, **fields), who)


def of_ended(name: str, kind: type[Message], who: str = "root", **fields: object) -> Deed:
    return lambda world: world.call(name, kind(job_id=world.ended, **fields), who)


def reports(report: job_pb2.Report | None = None, **rank: object) -> Deed:
    """The running job's worker reports this of its rank, or of its training."""

    def act(world: World) -> Outcome:
        request = pb.ReportProgressRequest(job_id=world.running, attempt=1)
        if report is not None:
            request.reports.append(report)
        if rank:
            request.ranks.append(pb.RankReport(**rank))
        return world.call("ReportProgress", request, "worker")

    return act


def http(sent: bytes) -> Deed:
    return lambda world: world.http(sent)
