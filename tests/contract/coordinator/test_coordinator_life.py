"""Starting, stopping and dying: the coordinator as a process of its own."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from coordinator.addresses import Address
from coordinator.serve import CannotServe, running
from protos import coordinator_pb2 as pb
from protos import coordinator_pb2_grpc, job_pb2

READY = re.compile(
    r"paceline coordinator ready: grpc (127\.0\.0\.1:\d+), http (127\.0\.0\.1:\d+), state (\S+), 2 slots\n"
)
FREE = "127.0.0.1:0"


class Serving:
    """A coordinator process: its first line, its address, a stub."""

    def __init__(self, *arguments: str) -> None:
        script = str(Path(__file__).parent / "serve_fake.py")
        self.process = subprocess.Popen(
            [sys.executable, script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()

    def connect(self) -> coordinator_pb2_grpc.CoordinatorServiceStub:
        match = READY.fullmatch(self.line)
        assert match is not None, self.line or self.process.communicate(timeout=20)
        self.channel = grpc.insecure_channel(match[1])
        return coordinator_pb2_grpc.CoordinatorServiceStub(self.channel)

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Exit code and standard error."""
        self.process.send_signal(number)
        errors = self.process.communicate(timeout=20)[1]
        return self.process.returncode, errors


@pytest.fixture
def state(tmp_path: Path) -> str:
    return str(tmp_path / "state")


@pytest.fixture
def serving(fake_mpirun: str) -> Iterator[Callable[..., Serving]]:
    started: list[Serving] = []

    def start(listen: str, http: str, state: str, *slots: str) -> Serving:
        started.append(Serving(fake_mpirun, listen, http, state, *slots))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
        one.process.communicate(timeout=20)
        if hasattr(one, "channel"):
            one.channel.close()


def submit(stub, talk_spec, name: str) -> str:
    return stub.SubmitJob(pb.SubmitJobRequest(spec=talk_spec(name, 2)), timeout=10).job.id


def get(stub, job_id: str) -> job_pb2.Job:
    return stub.GetJob(pb.GetJobRequest(job_id=job_id), timeout=10).job


def wait_until_running(stub, job_id: str) -> None:
    for event in stub.WatchJob(pb.WatchJobRequest(job_id=job_id), timeout=20):
        if event.job.state == job_pb2.JOB_STATE_RUNNING:
            return
    raise AssertionError(get(stub, job_id))


def processes_of(job_id: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            variables = (entry / "environ").read_bytes()
            is_zombie = " Z " in (entry / "stat").read_text(errors="replace")
        except OSError:
            continue
        if f"PACELINE_JOB_ID={job_id}".encode() in variables and not is_zombie:
            found.append(int(entry.name))
    return found


def states_of(job: job_pb2.Job) -> list[str]:
    return [job_pb2.JobState.Name(change.state).removeprefix("JOB_STATE_") for change in job.history]


def test_ctrl_c_ends_what_runs_and_the_next_coordinator_goes_on_with_it(serving, make_spec, state) -> None:
    first = serving(FREE, FREE, state)
    stub = first.connect()
    running, waiting = submit(stub, make_spec, "long-once"), submit(stub, make_spec, "good")
    wait_until_running(stub, running)
    watch = stub.WatchJob(pb.WatchJobRequest(job_id=running), timeout=20)
    code, errors = first.end(signal.SIGINT)
    assert code == 0, errors
    assert "Traceback" not in errors
    assert processes_of(running) == []
    with pytest.raises(grpc.RpcError, match=r"the coordinator is stopping; job .* stays RESTARTING"):
        list(watch)

    stub = serving(FREE, FREE, state).connect()
    for job_id in (running, waiting):
        for event in stub.WatchJob(pb.WatchJobRequest(job_id=job_id), timeout=20):
            last = event
        assert last.job.state == job_pb2.JOB_STATE_SUCCEEDED, last.job
    ended = get(stub, running)
    assert states_of(ended) == ["QUEUED", "STARTING", "RUNNING", "RESTARTING", "STARTING", "SUCCEEDED"]
    assert ended.history[3].reason == "CoordinatorStopped"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_job_runs_on_without_its_coordinator_and_the_next_one_takes_it_over(
    serving, make_spec, state, number
) -> None:
    first = serving(FREE, FREE, state)
    stub = first.connect()
    running, waiting = submit(stub, make_spec, "patient"), submit(stub, make_spec, "good")
    wait_until_running(stub, running)
    before = processes_of(running)
    code, errors = first.end(number)
    assert code == (0 if number == signal.SIGTERM else -signal.SIGKILL), errors
    assert "Traceback" not in errors
    assert processes_of(running) == before

    stub = serving(FREE, FREE, state).connect()  # at another port, which the worker finds
    taken = get(stub, running)
    assert (taken.state, taken.attempt) == (job_pb2.JOB_STATE_RUNNING, 1)
    (Path(state) / "jobs" / running / "logs" / "go-on").touch()
    for job_id in (running, waiting):
        for event in stub.WatchJob(pb.WatchJobRequest(job_id=job_id), timeout=20):
            last = event
        assert last.job.state == job_pb2.JOB_STATE_SUCCEEDED, last.job
    ended = get(stub, running)
    assert (states_of(ended), ended.attempt) == (["QUEUED", "STARTING", "RUNNING", "SUCCEEDED"], 1)
    assert ended.progress.step == 4
    assert processes_of(running) == []


def test_what_ended_while_the_coordinator_was_away_is_finished_with_its_reports(serving, make_spec, state) -> None:
    first = serving(FREE, FREE, state)
    stub = first.connect()
    finished, failed = (
        stub.SubmitJob(pb.SubmitJobRequest(spec=make_spec(name)), timeout=10).job.id for name in ("deaf", "deaf-broken")
    )
    for job_id in (finished, failed):
        wait_until_running(stub, job_id)
    first.end(signal.SIGKILL)
    for job_id in (finished, failed):
        (Path(state) / "jobs" / job_id / "logs" / "go-on").touch()
        until_no_process(job_id)

    stub = serving(FREE, FREE, state).connect()
    for job_id in (finished, failed):
        for _ in stub.WatchJob(pb.WatchJobRequest(job_id=job_id), timeout=20):
            pass
    ended = get(stub, finished)
    assert (ended.state, ended.attempt) == (job_pb2.JOB_STATE_SUCCEEDED, 1)
    reports = stub.GetMetrics(pb.GetMetricsRequest(job_id=finished), timeout=10).reports
    assert [report.step for report in reports] == [1, 2, 3]
    ended = get(stub, failed)
    assert (ended.state, ended.reason, ended.attempt) == (job_pb2.JOB_STATE_FAILED, "RankFailed", 1)
    assert ended.message.startswith("rank 0 of 1 on here: the loss is nan at step 2")


def test_a_second_coordinator_on_the_same_folder_refuses(serving, state) -> None:
    first = serving(FREE, FREE, state)
    second = serving(FREE, FREE, state)
    assert second.line == ""
    errors = second.process.communicate(timeout=20)[1]
    assert second.process.returncode == 1
    assert errors == (
        f"error: another coordinator (pid {first.process.pid}) uses {state}: "
        "stop it, or give this one another --state folder\n"
    )
    assert first.end()[0] == 0


def until_no_process(job_id: str) -> None:
    deadline = time.monotonic() + 20
    while found := processes_of(job_id):
        assert time.monotonic() < deadline, found
        time.sleep(0.02)


@pytest.mark.parametrize("option", ["--listen", "--http"])
def test_a_port_in_use_is_one_line_and_exit_code_1(serving, state, option) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        one = serving(address, FREE, state) if option == "--listen" else serving(FREE, address, state)
        errors = one.process.communicate(timeout=20)[1]
    assert one.process.returncode == 1
    assert errors == (
        f"error: {option}: cannot listen on {address}: Address already in use; choose another with {option} HOST:PORT\n"
    )


@pytest.mark.parametrize("option", ["listen", "http"])
def test_a_refused_start_leaves_no_state_folder_that_was_not_there(settings, tmp_path, option) -> None:
    (tmp_path / "mine").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        changed = {option: Address("127.0.0.1", taken.getsockname()[1])}
        for folder in ("state", "mine/new/state"):
            with pytest.raises(CannotServe), running(replace(settings, state=tmp_path / folder, **changed)):
                pass
    assert sorted(tmp_path.rglob("*")) == before


def test_a_refused_start_leaves_a_state_folder_that_was_there(settings) -> None:
    with running(settings):
        pass
    before = sorted(settings.state.iterdir())
    assert settings.state / "paceline.sqlite" in before
    with socket.create_server(("127.0.0.1", 0)) as taken:
        changed = replace(settings, listen=Address("127.0.0.1", taken.getsockname()[1]))
        with pytest.raises(CannotServe), running(changed):
            pass
    assert sorted(settings.state.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("nonsense", FREE, "{state}"), "error: --listen: 'nonsense' is not HOST:PORT"),
        (("0.0.0.0:0", FREE, "{state}"), "error: --listen 0.0.0.0:0: other machines can reach this: give --tls-"),
        ((FREE, "0.0.0.0:0", "{state}"), "error: --http 0.0.0.0:0: other machines can reach this: give --tls-"),
        ((FREE, FREE, "{state}", "0"), "error: --slots: 0 is not at least 1"),
        ((FREE, FREE, "{state}", "2", "mysql://me:secret@here/jobs"), "error: --store: 'mysql' is not postgresql"),
        ((FREE, FREE, "{state}", "2", "", "jobs=4"), "error: --limit: 'jobs=4': there is no limit 'jobs'; there are "),
    ],
)
def test_bad_usage_is_exit_code_2(serving, state, arguments, fault) -> None:
    one = serving(*(argument.format(state=state) for argument in arguments))
    errors = one.process.communicate(timeout=20)[1]
    assert one.process.returncode == 2
    assert errors.startswith(fault)
    assert len(errors.splitlines()) == 1


def test_a_state_folder_that_cannot_be_made_is_one_line(serving, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    one = serving(FREE, FREE, str(tmp_path / "file" / "state"))
    errors = one.process.communicate(timeout=20)[1]
    assert one.process.returncode == 1
    assert errors == f"error: --state: cannot use {tmp_path}/file/state: Not a directory\n"


def test_the_folder_is_its_owners_alone_and_holds_no_token(talk) -> None:
    state = talk.coordinator.settings.state
    job_id = talk.submit("long").id
    talk.until_state(job_id, job_pb2.JOB_STATE_RUNNING)
    assert os.stat(state).st_mode & 0o077 == 0
    (pid, *_) = processes_of(job_id)
    variables = (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0")
    (token,) = (value[len(b"PACELINE_JOB_TOKEN=") :] for value in variables if value.startswith(b"PACELINE_JOB_TOKEN="))
    assert token not in (Path("/proc") / str(pid) / "cmdline").read_bytes()
    for path in state.rglob("*"):
        assert not path.is_file() or token not in path.read_bytes(), path


def test_health_and_reflection_answer(talk) -> None:
    with grpc.insecure_channel(str(talk.coordinator.grpc_address)) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "paceline.v1.CoordinatorService"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = stub.ServerReflectionInfo(iter([asked]), timeout=10)
        listed = {service.name for service in answer.list_services_response.service}
    assert {"paceline.v1.CoordinatorService", "grpc.health.v1.Health"} <= listed


def test_a_stopping_coordinator_says_so_and_takes_no_more_jobs(talk) -> None:
    job_id = talk.submit("long", workers=2).id
    talk.until_state(job_id, job_pb2.JOB_STATE_RUNNING)
    queued = talk.submit("good").id
    watch = talk.stub.WatchJob(pb.WatchJobRequest(job_id=queued), timeout=20)
    next(watch)
    talk.coordinator.controller.stop()
    assert talk.get(job_id).reason == "CoordinatorStopped"
    with pytest.raises(grpc.RpcError) as error:
        talk.submit("good")
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE
    talk.coordinator.stop()
    with pytest.raises(grpc.RpcError) as error:
        list(watch)
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE
    assert talk.coordinator.fault() == "stopping"
