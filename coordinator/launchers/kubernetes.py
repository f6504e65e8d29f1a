"""Kubernetes as a launcher: an MPIJob of the MPI Operator's (v2beta1) for each attempt, through the official client.

Rules: `render` is pure and says everything that is created. The operator starts a pod for every worker, with sshd, and
one that runs the keeper (keeper.py), and that mpirun; so do jobs with parameter servers, which the ranks start. The
state folder is one volume, at the same path in every pod and for the coordinator. A pod told to end has its grace: the
keeper lets the ranks write a checkpoint. Tokens go by a Secret that goes with its MPIJob. The client is an extra and is
imported where it is used alone.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from coordinator.folders import JobFolder
from coordinator.jobs import Job
from coordinator.launchers import foreign, local
from coordinator.launchers.causes import begin_attempt
from coordinator.launchers.foreign import Seen
from coordinator.launchers.kubernetes_states import seen_of
from coordinator.launchers.options import OptionInvalid
from coordinator.runs import Command, Launcher
from protos.environment import JOB_TOKEN

if TYPE_CHECKING:
    from coordinator.launchers.kubernetes_api import Api

OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "image": "a container image with Paceline, Open MPI and sshd",
        "claim": "the PersistentVolumeClaim that holds the state folder; pods mount it at --volume's path",
        "volume": "where it is mounted, here and in the pods; a folder above --state",
        "namespace": "where jobs are created; default",
        "prefix": "the environment with Paceline inside the image; this one's path",
        "ranks-per-pod": "how many ranks share a worker's pod; 1",
        "cpu": "of a rank; 1",
        "memory": "of a rank, such as 2Gi",
        "kubeconfig": "how to reach the cluster; $KUBECONFIG, ~/.kube/config, or the pod we are in",
        "context": "of the kubeconfig file",
    }
)
REQUIRED = ("image", "claim", "volume")
NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|[KMGT]i?)?")
PATH = re.compile(r"/[A-Za-z0-9_./-]*")
IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./:@-]*")
SHAPES: Mapping[str, re.Pattern[str]] = MappingProxyType(
    {
        "image": IMAGE,
        "claim": NAME,
        "volume": PATH,
        "namespace": NAME,
        "prefix": PATH,
        "ranks-per-pod": re.compile(r"[1-9][0-9]{0,3}"),
        "cpu": QUANTITY,
        "memory": QUANTITY,
        "kubeconfig": re.compile(r".+"),
        "context": re.compile(r"\S+"),
    }
)
DEFAULTS = {"namespace": "default", "ranks-per-pod": "1", "cpu": "1"}
HOST_FILE = "/etc/mpi/hostfile"  # where the operator puts it
SSH_ARGUMENTS = "-o ConnectionAttempts=10 -o StrictHostKeyChecking=no"  # workers' names are new each time
LABEL = "paceline.dev/launch"
LEAVE_SECONDS = 10  # beyond limits.grace_seconds, for a pod that is told to end
KEPT_SECONDS = 3600  # an MPIJob that has ended, for whoever looks at it with kubectl


def read_options(options: Mapping[str, str]) -> Mapping[str, str]:
    """The options with what is left out, raising OptionInvalid."""
    for name in REQUIRED:
        if name not in options:
            raise OptionInvalid(f"{name}=VALUE is missing: {OPTIONS[name]}")
    for name, value in options.items():
        if not SHAPES[name].fullmatch(value):
            raise OptionInvalid(f"{name}={value}: not {OPTIONS[name].partition(';')[0]}")
    return {**DEFAULTS, "prefix": sys.prefix, **options}


def check(options: Mapping[str, str]) -> int:
    """How many ranks the nodes have cores for; LauncherMissing where the client, the cluster or the operator is."""
    return _api(options).cores()


@dataclass(frozen=True)
class Manifests:
    """What is created, the Secret first."""

    secret: dict[str, Any]
    mpi_job: dict[str, Any]


def render(
    *,
    name: str,
    launch: local.Launch,
    ranks: int,
    record: Path,
    secrets: Mapping[str, str],
    grace_seconds: float,
    options: Mapping[str, str],
) -> Manifests:
    """The MPIJob that runs `launch` in pods with room for so many ranks.

    Args:
        name: of everything that is created.
        launch: its program, its ranks and its variables, with the paths of the image.
        record: the keeper's file.
        secrets: variables that no manifest may show.
    """
    pods = -(-ranks // int(options["ranks-per-pod"]))
    labels = {LABEL: name, "app.kubernetes.io/managed-by": "paceline"}
    metadata = {"name": name, "namespace": options["namespace"], "labels": labels}
    mpirun, *rest = launch.argv
    where = ["--hostfile", HOST_FILE, "--prefix", options["prefix"], "--prtemca", "plm_ssh_args", SSH_ARGUMENTS]
    python = f"{options['prefix']}/bin/python"
    keeper = [python, "-m", "coordinator.launchers.keeper", "--hosted", str(record)]
    told = {each: value for each, value in sorted(launch.environment.items()) if each not in secrets}
    env: list[dict[str, Any]] = [{"name": each, "value": value} for each, value in told.items()]
    env += [{"name": each, "valueFrom": {"secretKeyRef": {"name": name, "key": each}}} for each in sorted(secrets)]
    launcher = {"command": [*keeper, mpirun, *where, *rest], "env": env}
    worker = {"resources": _resources(min(ranks, int(options["ranks-per-pod"])), options)}

    def replica(role: str, count: int, container: Mapping[str, Any]) -> dict[str, Any]:
        volume = {"name": "state", "persistentVolumeClaim": {"claimName": options["claim"]}}
        mount = {"name": "state", "mountPath": options["volume"]}
        spec = {
            "containers": [{"name": role, "image": options["image"], "volumeMounts": [mount], **container}],
            "volumes": [volume],
            "terminationGracePeriodSeconds": int(grace_seconds) + LEAVE_SECONDS,
        }
        template = {"metadata": {"labels": labels}, "spec": spec}
        return {"replicas": count, "restartPolicy": "Never", "template": template}

    mpi_job = {
        "apiVersion": "kubeflow.org/v2beta1",
        "kind": "MPIJob",
        "metadata": metadata,
        "spec": {
            "slotsPerWorker": int(options["ranks-per-pod"]),
            "launcherCreationPolicy": "WaitForWorkersReady",
            # Paceline launches it again, from its newest checkpoint.
            "runPolicy": {"backoffLimit": 0, "cleanPodPolicy": "Running", "ttlSecondsAfterFinished": KEPT_SECONDS},
            "mpiReplicaSpecs": {
                "Launcher": replica("launcher", 1, launcher),
                "Worker": replica("worker", pods, worker),
            },
        },
    }
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": metadata,
        "type": "Opaque",
        "stringData": dict(secrets),
    }
    return Manifests(secret, mpi_job)


class Cluster:
    """The MPIJobs of one namespace (foreign.System)."""

    title = "Kubernetes"

    def __init__(self, api: Api) -> None:
        self._api = api

    def submit(self, manifests: Manifests) -> str:
        """Create them and return the name, which is the handle. NoAnswer, SubmitRefused."""
        self._api.create(manifests.secret, manifests.mpi_job)
        name: str = manifests.mpi_job["metadata"]["name"]
        return name

    def find(self, name: str) -> str | None:
        return name if name in self._api.mpi_jobs(f"{LABEL}={name}") else None

    def look(self, handles: Collection[str]) -> Mapping[str, Seen]:
        jobs = self._api.mpi_jobs(LABEL)
        pods: dict[str, list[dict[str, Any]]] = {}
        for pod in self._api.pods(LABEL):
            pods.setdefault(pod["metadata"]["labels"][LABEL], []).append(pod)
        present = [handle for handle in handles if handle in jobs or handle in pods]
        return {handle: seen_of(handle, jobs.get(handle), pods.get(handle, [])) for handle in present}

    def ask_to_stop(self, handle: str) -> None:
        """By the end of the launcher's pod, whose keeper has the ranks write a checkpoint within the grace."""
        self._api.delete_pods(f"{LABEL}={handle},training.kubeflow.org/job-role=launcher", at_once=False)

    def end(self, handle: str, kill: bool) -> None:
        self._api.delete_mpi_job(handle)
        if kill:
            self._api.delete_pods(f"{LABEL}={handle}", at_once=True)


def make_launcher(
    options: Mapping[str, str],
    mpirun: str,
    worker: str,
    command: Command,
) -> Launcher:
    """Starts `paceline-worker` in pods.

    Args:
        mpirun, worker: here; those of the image have the same names in its own environment.
        command: the worker's arguments and the variables that every rank must see, for a job, its token and its folder.
    """
    system = Cluster(_api(options))
    watch = foreign.Watch(system)

    def start(job: Job, secret: str, folder: JobFolder) -> foreign.Running:
        arguments, forwarded = command(job, secret, folder)
        launch = local.render(
            mpirun=f"{options['prefix']}/bin/{Path(mpirun).name}",
            worker=f"{options['prefix']}/bin/{Path(worker).name}",
            ranks=job.slots,
            cores=job.slots,
            arguments=arguments,
            forwarded=forwarded,
        )
        manifests = render(
            name=name_of(job),
            launch=launch,
            ranks=job.slots,
            record=local.record_of(folder.logs, job.attempt).absolute(),
            secrets={JOB_TOKEN: secret},
            grace_seconds=job.spec.limits.grace_seconds,
            options=options,
        )
        folder.logs.mkdir(parents=True, exist_ok=True)
        if job.attempt > 1:
            begin_attempt(folder.logs, job.attempt)
        return foreign.start(system, watch, name_of(job), folder.logs, job.attempt, lambda: system.submit(manifests))

    def adopt(job: Job, folder: JobFolder) -> foreign.Running | local.Running | None:
        return foreign.adopt(system, watch, name_of(job), folder.logs, job.attempt)

    return Launcher(start, adopt, foreign.explain_end)


def name_of(job: Job) -> str:
    """At most 52 characters with up to three digits for the attempt: the operator puts up to 11 behind it."""
    return f"{job.id[-44:].lstrip('-')}-a{job.attempt}"


def _resources(ranks: int, options: Mapping[str, str]) -> dict[str, Any]:
    """What a pod of so many ranks asks for; memory it may not exceed either."""
    wanted = {"cpu": _times(options["cpu"], ranks)}
    if "memory" not in options:
        return {"requests": wanted}
    memory = {"memory": _times(options["memory"], ranks)}
    return {"requests": wanted | memory, "limits": memory}


def _times(quantity: str, count: int) -> str:
    number, unit = re.fullmatch(r"([0-9.]+)(\D*)", quantity).groups()  # type: ignore[union-attr]  # it is a QUANTITY
    return f"{float(number) * count:g}{unit}"


def _api(options: Mapping[str, str]) -> Api:
    try:
        from coordinator.launchers.kubernetes_api import Api
    except ModuleNotFoundError as fault:
        if (fault.name or "").partition(".")[0] != "kubernetes":
            raise
        message = "--launcher kubernetes needs the official client: pip install 'paceline[kubernetes]'"
        raise local.LauncherMissing(message) from None
    return Api(options["namespace"], options.get("kubeconfig"), options.get("context"))
