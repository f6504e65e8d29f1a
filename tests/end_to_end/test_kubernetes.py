"""Jobs through a coordinator and a Kubernetes API server of the tests' own, whose pods are processes of this machine.

What a pod's container would run is run as the manifest says, with its variables and its Secret; only the host file,
which the MPI Operator puts into the pod, is written here.
"""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from coordinator.addresses import Address
from coordinator.launchers import kubernetes as launcher
from coordinator.launchers.local import find_mpirun, find_worker
from coordinator.launching import choose
from coordinator.serve import Settings, running
from protos import coordinator_pb2 as pb
from protos import coordinator_pb2_grpc, job_pb2
from protos.job_file import parse_job

pytest.importorskip("kubernetes", reason="pip install 'paceline[kubernetes]'")
pytest.importorskip("jsonschema", reason="pip install jsonschema")
from tests.end_to_end.jobs import ENDED, NEEDS_MPIRUN, watch
from tests.unit.launchers.api_server import MPI_JOBS, NAMESPACE, PODS, SECRETS, Cluster, api_server

pytestmark = NEEDS_MPIRUN
WAIT_SECONDS = 100.0
JOB = """
name: digits
data: {{train: {{built_in: digits}}, scale: 0.0625}}
model: [{{dense: {{units: 10}}}}]
loss: softmax_cross_entropy
optimizer: sgd
training: {{epochs: {epochs}, batch_size: 32, seed: 1, checkpoint_steps: 1000}}
workers: 2
"""


class Pods:
    """The operator and a kubelet: runs the launcher's container of each MPIJob, and ends it when its pod is deleted."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._cluster = cluster
        self._host_file = folder / "hostfile"
        self._host_file.write_text("localhost slots=2\n")
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._loop)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()
        for process in self._processes.values():
            process.kill()
            process.wait(WAIT_SECONDS)

    def _loop(self) -> None:
        told, over = set[str](), set[str]()
        while not self._over.wait(0.05):
            jobs, pods = self._cluster.objects[MPI_JOBS], self._cluster.objects[PODS]
            for name in list(jobs):
                if name not in self._processes:
                    self._processes[name] = self._start(name)
                    self._cluster.pod(name, "launcher")
                    self._cluster.condition(name, "Running")
            for name, process in self._processes.items():
                if name not in jobs:  # its pods go with it
                    pods.pop(f"{name}-launcher", None)
                if f"{name}-launcher" not in pods and name not in told:
                    process.send_signal(signal.SIGTERM)
                    told.add(name)
                if process.poll() is not None and name in jobs and name not in over:
                    self._cluster.condition(name, "Failed" if process.returncode else "Succeeded")
                    over.add(name)

    def _start(self, name: str) -> "subprocess.Popen[bytes]":
        replica = self._cluster.objects[MPI_JOBS][name]["spec"]["mpiReplicaSpecs"]["Launcher"]
        (container,) = replica["template"]["spec"]["containers"]
        secret = self._cluster.objects[SECRETS][name]["stringData"]
        told = {each["name"]: each["value"] if "value" in each else secret[each["name"]] for each in container["env"]}
        command = [str(self._host_file) if word == launcher.HOST_FILE else word for word in container["command"]]
        return subprocess.Popen(command, env=os.environ | told)


@contextmanager
def served(cluster: Cluster, folder: Path) -> Iterator[coordinator_pb2_grpc.CoordinatorServiceStub]:
    given = {"image": "paceline", "claim": "states", "volume": str(folder), "namespace": NAMESPACE}
    texts = [f"{name}={value}" for name, value in (given | {"kubeconfig": str(folder / "config")}).items()]
    choice, slots = choose("kubernetes", texts, folder / "state")
    free = Address("127.0.0.1", 0)
    settings = Settings(free, free, folder / "state", (), slots, find_mpirun(), find_worker())
    with (
        running(replace(settings, launcher=choice)) as coordinator,
        grpc.insecure_channel(str(coordinator.grpc_address)) as channel,
    ):
        yield coordinator_pb2_grpc.CoordinatorServiceStub(channel)


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[coordinator_pb2_grpc.CoordinatorServiceStub]:
    with api_server(tmp_path) as cluster:
        pods = Pods(cluster, tmp_path)
        try:
            with served(cluster, tmp_path) as stub:
                yield stub
        finally:
            pods.stop()


def until(stub, job_id: str, *states: "job_pb2.JobState") -> job_pb2.Job:
    return watch(stub, job_id, lambda job: job.state in states, WAIT_SECONDS)


def submit(stub, epochs: int) -> str:
    return stub.SubmitJob(pb.SubmitJobRequest(spec=parse_job(JOB.format(epochs=epochs))), timeout=WAIT_SECONDS).job.id


def test_what_the_manifests_run_trains_and_succeeds(stub) -> None:
    job = until(stub, submit(stub, epochs=2), *ENDED)
    assert (job.state, job.attempt, job.summary.world_size) == (job_pb2.JOB_STATE_SUCCEEDED, 1, 2), job


def test_a_paused_job_writes_a_checkpoint_within_its_pods_grace_and_goes_on_from_it(stub) -> None:
    job_id = submit(stub, epochs=1_000_000)
    until(stub, job_id, job_pb2.JOB_STATE_RUNNING)
    stub.PauseJob(pb.PauseJobRequest(job_id=job_id), timeout=WAIT_SECONDS)
    job = until(stub, job_id, job_pb2.JOB_STATE_PAUSED)
    assert job.message == "paused; its ranks wrote a checkpoint and left"
    stub.ResumeJob(pb.ResumeJobRequest(job_id=job_id), timeout=WAIT_SECONDS)
    until(stub, job_id, job_pb2.JOB_STATE_RUNNING)
    stub.CancelJob(pb.CancelJobRequest(job_id=job_id), timeout=WAIT_SECONDS)
    assert until(stub, job_id, *ENDED).state == job_pb2.JOB_STATE_CANCELLED
    lines = stub.StreamLogs(pb.StreamLogsRequest(job_id=job_id, rank=0), timeout=WAIT_SECONDS)
    assert any(line.line.startswith("resuming after step ") for line in lines)
