"""Jobs over several hosts by ssh (tests/mpi/hosts.py), through a coordinator on the first of them."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mpi.hosts import Hosts, enter, make_hosts, why_not
from tests.mpi.jobs import write_data, write_job

WAIT_SECONDS = 100.0
PROGRAM = Path(sys.executable).with_name("paceline")
PORT = 50051


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if reason := why_not():
        pytest.skip(reason)
    with make_hosts(3) as made:
        yield made


class Served:
    """A coordinator on the first of the hosts; its verbs are typed there."""

    def __init__(self, hosts: Hosts, host_file: Path, state: Path) -> None:
        self._enter = enter(hosts[0])
        self._server = f"{hosts[0].address}:{PORT}"
        words = ["--listen", self._server, "--http", "127.0.0.1:0", "--insecure", "--state", str(state)]
        options = (f"hosts={host_file}", f"ssh-config={hosts.folder / 'ssh_config'}")
        for option in options:
            words += ["--launcher-option", option]
        self.process = subprocess.Popen(
            [*self._enter, str(PROGRAM), "serve", "--launcher", "ssh", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.ready = self.process.stdout.readline()
        if not self.ready:
            raise AssertionError(self.process.communicate(timeout=WAIT_SECONDS)[1])

    def verb(self, *words: object) -> "subprocess.CompletedProcess[str]":
        command = [*self._enter, str(PROGRAM), *map(str, words), "--server", self._server]
        return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_SECONDS)

    def submit(self, job: Path) -> str:
        done = self.verb("submit", job)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def get(self, job_id: str) -> dict:
        return json.loads(self.verb("get", job_id, "--format", "json").stdout)

    def until(self, job_id: str, wanted: Callable[[dict], bool]) -> dict:
        deadline = time.monotonic() + WAIT_SECONDS
        while not wanted(job := self.get(job_id)):
            assert time.monotonic() < deadline, job
            time.sleep(0.1)
        return job


@contextmanager
def served(hosts: Hosts, tmp_path: Path, *lines: str) -> Iterator[Served]:
    host_file = tmp_path / "hosts"
    host_file.write_text("\n".join(lines) + "\n")
    coordinator = Served(hosts, host_file, tmp_path / "state")
    try:
        yield coordinator
    finally:
        coordinator.process.terminate()
        coordinator.process.communicate(timeout=WAIT_SECONDS)


def slots(hosts: Hosts, *numbers: int) -> list[str]:
    return [f"{host.address} slots={number}" for host, number in zip(hosts.hosts, numbers, strict=False)]


def job_file(folder: Path, **changed: object) -> Path:
    return write_job(folder, write_data(folder / "toy.npz"), **changed)


def test_a_job_trains_on_two_hosts_by_ssh_and_succeeds(hosts: Hosts, tmp_path: Path) -> None:
    with served(hosts, tmp_path, *slots(hosts, 2, 1)) as coordinator:
        assert ", 3 slots" in coordinator.ready
        done = coordinator.verb("submit", job_file(tmp_path, workers=3), "--watch")
        assert done.returncode == 0, done.stdout + done.stderr
        job_id = done.stdout.split()[0]
        job = coordinator.get(job_id)
        assert (job["state"], job["attempt"], job["summary"]["world_size"]) == ("SUCCEEDED", 1, 3)
    placed = (tmp_path / "state" / "jobs" / job_id / "logs" / "attempt-1.hosts").read_text()
    assert placed.splitlines() == slots(hosts, 2, 1)


def test_a_host_that_cannot_be_reached_is_named_with_what_to_do(hosts: Hosts, tmp_path: Path) -> None:
    nobody = hosts[0].address.rpartition(".")[0] + ".200"
    with served(hosts, tmp_path, f"{hosts[0].address} slots=1", f"{nobody} slots=1") as coordinator:
        done = coordinator.verb("submit", job_file(tmp_path, workers=2, limits={"retries": 0}), "--watch")
        assert done.returncode == 1
        job = coordinator.get(done.stdout.split()[0])
        assert (job["state"], job["reason"]) == ("FAILED", "HostUnreachable")
        assert job["message"].startswith(f"host {nobody} cannot be used: ssh says: ")
        assert f"{nobody} true` must work without a question" in job["message"]
        assert "1 slots on " in job["message"]
        # What fits elsewhere is not held up by it.
        done = coordinator.verb("submit", job_file(tmp_path, workers=1), "--watch")
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_host_that_dies_in_the_run_is_left_out_and_the_job_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    with make_hosts(3) as hosts, served(hosts, tmp_path, *slots(hosts, 1, 1, 1)) as coordinator:
        training = {"epochs": 100_000, "checkpoint_steps": 200}
        limits = {"retries": 2, "stall_seconds": 3.0}
        job_id = coordinator.submit(job_file(tmp_path, workers=2, training=training, limits=limits))
        folder = tmp_path / "state" / "jobs" / job_id
        coordinator.until(job_id, lambda job: any((folder / "output" / "checkpoints").glob("step-*.safetensors")))
        hosts[1].crash()
        job = coordinator.until(job_id, lambda job: job["attempt"] == 2 and job["state"] == "RUNNING")
        (lost,) = [change for change in job["history"] if change["state"] == "RESTARTING"]
        # Which is noticed first is nobody's: that mpirun's daemon there is gone, or that the rank is.
        assert lost["reason"] in ("HostLost", "RankKilled", "RankFailed"), lost
        assert "goes on from its newest checkpoint (retry 1 of 2)" in lost["message"]
        assert coordinator.verb("cancel", job_id).returncode == 0
        coordinator.until(job_id, lambda job: job["state"] == "CANCELLED")
        said = coordinator.verb("logs", job_id).stdout
        assert "resuming after step" in said
        assert f"host {hosts[1].address} cannot be used: ssh says: " in said
    placed = (folder / "logs" / "attempt-2.hosts").read_text()
    assert placed.splitlines() == [f"{hosts[0].address} slots=1", f"{hosts[2].address} slots=1"]


def test_a_killed_coordinator_takes_jobs_on_other_hosts_over_and_counts_their_slots(hosts: Hosts, tmp_path) -> None:
    job = job_file(tmp_path, workers=1, training={"epochs": 100_000, "checkpoint_steps": 10_000})
    lines = slots(hosts, 1, 1)
    with served(hosts, tmp_path, *lines) as first:
        there = first.submit(job)
        first.until(there, lambda job: job["state"] == "RUNNING")
        first.process.kill()
        first.process.wait(WAIT_SECONDS)
    with served(hosts, tmp_path, *lines) as second:
        here = second.submit(job)
        second.until(here, lambda job: job["state"] == "RUNNING")
        taken = second.get(there)
        assert (taken["state"], taken["attempt"]) == ("RUNNING", 1)
        for job_id in (there, here):
            second.verb("cancel", job_id)
            second.until(job_id, lambda job: job["state"] == "CANCELLED")
    logs = [tmp_path / "state" / "jobs" / job_id / "logs" / "attempt-1.hosts" for job_id in (there, here)]
    assert sorted(path.read_text().strip() for path in logs) == sorted(lines)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["node1 slots=2", "node1 slots=1"], "line 2: node1 is there twice"),
        (["node1 slots=two"], "line 1: 'node1 slots=two' is not `NAME slots=N`"),
        (["# nothing"], "it names no host"),
    ],
)
def test_a_bad_host_file_is_refused_before_a_coordinator_serves(tmp_path: Path, lines: list[str], said: str) -> None:
    host_file = tmp_path / "hosts"
    host_file.write_text("\n".join(lines))
    words = [
        PROGRAM,
        "serve",
        "--launcher",
        "ssh",
        "--launcher-option",
        f"hosts={host_file}",
        "--state",
        tmp_path / "s",
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=WAIT_SECONDS)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"error: --launcher-option: hosts={host_file}: {said}"
