"""Kubernetes as a launcher: manifests against the operator's schema, states, and the client against a local server."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from coordinator.folders import JobFolder
from coordinator.jobs import Observed
from coordinator.launchers import keeper, kubernetes, local
from coordinator.launchers.foreign import NoAnswer, Phase, Seen, SubmitRefused
from coordinator.launchers.kubernetes_states import CONDITIONS, TERMINATED, UNPLACED, WAITING, seen_of
from coordinator.launchers.options import OptionInvalid
from coordinator.launching import choose
from coordinator.recovery import RETRIED
from coordinator.runs import Launcher
from protos import job_pb2

jsonschema = pytest.importorskip("jsonschema", reason="pip install jsonschema")
pytest.importorskip("kubernetes", reason="pip install 'paceline[kubernetes]'")
from tests.unit.launchers.api_server import (  # noqa: E402  # needs both
    MPI_JOBS,
    NAMESPACE,
    PODS,
    SCHEMA,
    SECRETS,
    Cluster,
    api_server,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "kubernetes"
WAIT_SECONDS = 30.0
GIVEN = {"image": "registry/paceline:1", "claim": "states", "volume": "/state", "prefix": "/opt/paceline"}


def manifests(ranks: int, **options: str) -> kubernetes.Manifests:
    launch = local.render(
        mpirun="/opt/paceline/bin/mpirun",
        worker="/opt/paceline/bin/paceline-worker",
        ranks=ranks,
        cores=ranks,
        arguments=["train", "/state/jobs/digits-1/job.yaml", "-o", "/state/jobs/digits-1/output"],
        forwarded={"PACELINE_JOB_TOKEN": "hidden-value", "PACELINE_JOB_ID": "digits-1"},
    )
    return kubernetes.render(
        name="digits-1-a2",
        launch=launch,
        ranks=ranks,
        record=Path("/state/jobs/digits-1/logs/attempt-2"),
        secrets={"PACELINE_JOB_TOKEN": "hidden-value"},
        grace_seconds=20.0,
        options=kubernetes.read_options(GIVEN | options),
    )


@pytest.mark.parametrize(
    ("golden", "ranks", "options"),
    [
        ("two_ranks", 2, {}),
        (
            "ten_ranks_in_pods_of_four",
            10,
            {"ranks-per-pod": "4", "cpu": "500m", "memory": "2Gi", "namespace": "vision"},
        ),
    ],
)
def test_a_manifest_is_as_the_golden_file_says_and_the_operators_schema_takes_it(golden, ranks, options) -> None:
    mpi_job = manifests(ranks, **options).mpi_job
    jsonschema.validate(mpi_job, SCHEMA)
    assert json.dumps(mpi_job, indent=1) + "\n" == (GOLDEN / f"{golden}.json").read_text()


def test_the_schema_refuses_what_the_operator_would() -> None:
    mpi_job = manifests(2).mpi_job
    mpi_job["spec"]["mpiReplicaSpecs"]["Worker"]["replica"] = 2
    with pytest.raises(jsonschema.ValidationError, match=r"'replica' was unexpected"):
        jsonschema.validate(mpi_job, SCHEMA)


def test_a_token_is_in_the_secret_alone() -> None:
    rendered = manifests(2)
    assert "hidden-value" not in json.dumps(rendered.mpi_job)
    assert rendered.secret["stringData"] == {"PACELINE_JOB_TOKEN": "hidden-value"}
    (launcher,) = rendered.mpi_job["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"]
    secret = {"secretKeyRef": {"name": "digits-1-a2", "key": "PACELINE_JOB_TOKEN"}}
    assert launcher["env"][-1] == {"name": "PACELINE_JOB_TOKEN", "valueFrom": secret}


@pytest.mark.parametrize(("attempt", "name"), [(1, "digits-1-a1"), (999, "digits-1-a999")])
def test_a_name_has_room_for_what_the_operator_puts_behind_it(attempt: int, name: str) -> None:
    assert kubernetes.name_of(SimpleNamespace(id="digits-1", attempt=attempt)) == name
    longest = kubernetes.name_of(SimpleNamespace(id=f"{'x' * 3}{'-' * 3}{'y' * 42}", attempt=999))
    assert len(longest + "-worker-999") <= 63
    assert longest.startswith("y")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"image": ""}, "image=: not a container image"),
        ({"volume": "relative"}, "volume=relative: not where it is mounted"),
        ({"ranks-per-pod": "0"}, "ranks-per-pod=0: not how many ranks"),
        ({"memory": "much"}, "memory=much: not of a rank"),
        ({"namespace": "Vision"}, "namespace=Vision: not where jobs are created"),
    ],
)
def test_a_value_that_kubernetes_would_refuse_is_refused_at_once(changed: dict[str, str], said: str) -> None:
    with pytest.raises(OptionInvalid) as refused:
        kubernetes.read_options(GIVEN | changed)
    assert str(refused.value).startswith(said)


def test_what_has_no_default_must_be_given() -> None:
    with pytest.raises(OptionInvalid, match=r"^claim=VALUE is missing: the PersistentVolumeClaim"):
        kubernetes.read_options({"image": "x", "volume": "/state"})


# --------------------------------------------------------------------------------------------------------------- states


def pod(name: str = "x-launcher", **status: object) -> dict[str, object]:
    return {"metadata": {"name": name}, "status": status}


def waiting(reason: str, message: str = "") -> dict[str, object]:
    return pod(containerStatuses=[{"state": {"waiting": {"reason": reason, "message": message}}}])


def mpi_job(*conditions: str) -> dict[str, object]:
    return {"status": {"conditions": [{"type": each, "status": "True"} for each in conditions]}}


UNPLACEABLE = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes\n are free"}
KILLED = pod(containerStatuses=[{"state": {"terminated": {"reason": "OOMKilled", "exitCode": 137}}}])


@pytest.mark.parametrize(
    ("job", "pods", "seen"),
    [
        ({}, [], (Phase.WAITS, "HeldByOperator", "does the MPI Operator run")),
        (mpi_job("Created"), [], (Phase.STARTS, "Launching", "its pods are coming")),
        (mpi_job("Created"), [pod(conditions=[UNPLACEABLE])], (Phase.WAITS, "HeldForNodes", "0/3 nodes are free")),
        (mpi_job("Created"), [waiting("ContainerCreating")], (Phase.STARTS, "Launching", "its pods are coming")),
        (mpi_job("Created"), [waiting("ErrImagePull", "denied")], (Phase.STARTS, "ImagePullBackOff", "denied")),
        (mpi_job("Created"), [waiting("Novel", "odd")], (Phase.STARTS, "Novel", "pod x-launcher waits: odd")),
        (mpi_job("Created", "Running"), [pod()], (Phase.RUNS, "Launching", "its ranks are starting")),
        (mpi_job("Created", "Suspended"), [], (Phase.WAITS, "HeldSuspended", "is suspended")),
        (mpi_job("Running", "Succeeded"), [], (Phase.ENDED, "", "")),
        (mpi_job("Running", "Failed"), [pod()], (Phase.ENDED, "", "")),
        (mpi_job("Running", "Failed"), [pod(), KILLED], (Phase.ENDED, "OutOfMemory", "more memory than it had")),
        (mpi_job("Failed"), [pod(reason="Evicted", message="disk")], (Phase.ENDED, "Preempted", "was evicted: disk")),
        (None, [pod()], (Phase.RUNS, "Launching", "its pods are leaving")),
    ],
)  # fmt: skip
def test_what_kubernetes_says_becomes_our_reason_and_a_line(job, pods, seen: tuple[Phase, str, str]) -> None:
    said = seen_of("x", job, pods)
    assert (said.phase, said.reason) == seen[:2]
    assert seen[2] in said.message
    assert "\n" not in said.message
    assert "{" not in said.message


def test_every_row_has_a_place_in_the_coordinators_own_tables() -> None:
    for row in (*WAITING.values(), *UNPLACED.values(), *TERMINATED.values(), *CONDITIONS.values()):
        assert row.reason.startswith("Held") == (row.phase is Phase.WAITS)
        if row.phase is Phase.ENDED and row.reason:
            assert row.reason in RETRIED


# --------------------------------------------------------------------------------------------- a server on this machine


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with api_server(tmp_path) as cluster:
        yield cluster


@pytest.fixture
def options(tmp_path: Path) -> dict[str, str]:
    return dict(kubernetes.read_options(GIVEN | {"namespace": NAMESPACE, "kubeconfig": str(tmp_path / "config")}))


@pytest.fixture
def system(cluster: Cluster, options: dict[str, str]) -> kubernetes.Cluster:
    return kubernetes.Cluster(kubernetes._api(options))


def test_the_nodes_cores_are_the_slots(cluster: Cluster, options: dict[str, str]) -> None:
    assert kubernetes.check(options) == 6


@pytest.mark.parametrize(("path", "said"), [(MPI_JOBS, "could not find"), ("/api/v1/nodes", "nodes is forbidden")])
def test_a_cluster_without_the_operator_or_our_rights_is_refused(cluster, options, path: str, said: str) -> None:
    cluster.forbidden.add(path)
    with pytest.raises(local.LauncherMissing, match=rf"^--launcher kubernetes: .*{said}.*: install the MPI Operator"):
        kubernetes.check(options)


def test_no_kubeconfig_file_is_refused_with_what_to_do(options: dict[str, str]) -> None:
    with pytest.raises(local.LauncherMissing, match=r"^--launcher kubernetes: .*: is the kubeconfig file right"):
        kubernetes.check(options)


def test_a_submission_creates_both_and_the_secret_goes_with_its_job(cluster: Cluster, system) -> None:
    handle = system.submit(manifests(2, namespace=NAMESPACE))
    assert (handle, system.find(handle), system.find("another")) == ("digits-1-a2", "digits-1-a2", None)
    assert cluster.objects[SECRETS].keys() == cluster.objects[MPI_JOBS].keys() == {handle}
    system.submit(manifests(2, namespace=NAMESPACE))  # its answer may have been lost
    system.end(handle, kill=False)
    assert cluster.objects[SECRETS] == cluster.objects[MPI_JOBS] == {}
    system.end(handle, kill=True)
    assert system.look([handle]) == {}


def test_a_refused_job_leaves_no_secret(cluster: Cluster, system) -> None:
    rendered = manifests(2, namespace=NAMESPACE)
    rendered.mpi_job["spec"]["slotsPerWorker"] = "many"
    with pytest.raises(SubmitRefused, match=r"'many' is not of type 'integer'"):
        system.submit(rendered)
    assert cluster.objects[SECRETS] == {}


def test_a_server_that_is_away_is_told_from_one_that_refuses(cluster: Cluster, system) -> None:
    cluster.down = True
    for call in (lambda: system.submit(manifests(2)), lambda: system.look(["x"]), lambda: system.end("x", False)):
        with pytest.raises(NoAnswer, match=r"unable to handle the request"):
            call()


def test_a_pod_is_told_to_end_with_its_grace_and_killed_without(cluster: Cluster, system) -> None:
    handle = system.submit(manifests(2, namespace=NAMESPACE))
    for role in ("launcher", "worker"):
        cluster.pod(handle, role)
    system.ask_to_stop(handle)
    assert (list(cluster.objects[PODS]), cluster.graces) == ([f"{handle}-worker"], [""])
    system.end(handle, kill=False)
    assert system.look([handle]) == {
        handle: Seen(Phase.RUNS, "Launching", f"MPIJob {handle} is gone and its pods are leaving")
    }
    system.end(handle, kill=True)
    assert cluster.graces == ["", "0"]
    assert system.look([handle]) == {}


@pytest.fixture
def launcher(cluster: Cluster, options: dict[str, str]) -> Launcher:
    def command(job, secret, folder) -> tuple[list[str], dict[str, str]]:
        return ["train", str(folder.job_file)], {"PACELINE_JOB_TOKEN": secret}

    return kubernetes.make_launcher(options, "/here/mpirun", "/here/paceline-worker", command)


def until(wanted: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not wanted():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_job_waits_runs_and_ends_as_the_cluster_says_and_another_coordinator_sees_the_same(
    cluster: Cluster, launcher: Launcher, tmp_path: Path, make_launched
) -> None:
    job, folder = make_launched(), JobFolder(tmp_path / "job")
    running = launcher.start(job, "hidden-value", folder)
    until(lambda: cluster.objects[MPI_JOBS])
    name = kubernetes.name_of(job)
    cluster.pod(name, "launcher", conditions=[UNPLACEABLE])
    cluster.condition(name, "Created")
    until(lambda: (running.observed() or Observed("", "")).reason == "HeldForNodes")
    cluster.pod(name, "launcher")
    cluster.condition(name, "Running")
    other = launcher.adopt(job, folder)
    until(lambda: (other.observed() or Observed("", "")).reason == "Launching")
    # The launcher's container: what the manifest says, with a program in mpirun's place.
    (container,) = cluster.objects[MPI_JOBS][name]["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"][
        "containers"
    ]
    command = container["command"]
    assert command[1:5] == ["-m", "coordinator.launchers.keeper", "--hosted", str(folder.logs / "attempt-1")]
    done = subprocess.run([sys.executable, *command[1:5], "/bin/sh", "-c", "exit 0"], timeout=WAIT_SECONDS)
    assert done.returncode == 0
    assert running.wait(WAIT_SECONDS) == 0
    assert other.wait(WAIT_SECONDS) == 0
    assert (folder.logs / f"attempt-1{keeper.ENDED}").read_text() == "0\n"


def test_a_pod_out_of_memory_is_the_cause_of_the_end(cluster: Cluster, launcher, tmp_path: Path, make_launched) -> None:
    job, folder = make_launched(), JobFolder(tmp_path / "job")
    running = launcher.start(job, "hidden-value", folder)
    until(lambda: cluster.objects[MPI_JOBS])
    name = kubernetes.name_of(job)
    cluster.pod(name, "worker", **KILLED["status"])
    cluster.condition(name, "Failed")
    code = running.wait(WAIT_SECONDS)
    cause = launcher.explain(running, code, folder.logs)
    assert (cause.reason, cause.message.partition(":")[0]) == (
        "OutOfMemory",
        f"pod {name}-worker used more memory than it had",
    )


def test_a_cancelled_job_is_deleted(cluster: Cluster, launcher: Launcher, tmp_path: Path, make_launched) -> None:
    running = launcher.start(make_launched(), "hidden-value", JobFolder(tmp_path / "job"))
    until(lambda: cluster.objects[MPI_JOBS])
    running.terminate(5.0)
    assert cluster.objects[MPI_JOBS] == cluster.objects[SECRETS] == {}


@pytest.fixture
def make_launched() -> Callable[[], SimpleNamespace]:
    """As much of a job as a launcher looks at."""
    spec = job_pb2.JobSpec(workers=2)
    spec.limits.grace_seconds = 20
    return lambda: SimpleNamespace(id="digits-1", attempt=1, slots=2, spec=spec)


def test_without_the_client_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, options: dict[str, str]) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "kubernetes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "coordinator.launchers.kubernetes_api", raising=False)
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(local.LauncherMissing, match=r"pip install 'paceline\[kubernetes\]'"):
        kubernetes.check(options)


@pytest.mark.parametrize(
    ("name", "texts", "said"),
    [
        ("docker", [], "--launcher: docker is not one of local, ssh, slurm, kubernetes"),
        ("local", ["x=1"], "--launcher-option: x=1: --launcher local takes none"),
        (
            "kubernetes",
            ["image=x", "claim=states", "volume=/elsewhere"],
            "--launcher-option: volume=/elsewhere: --state /state/ours is not below it, so that no pod would see it",
        ),
    ],
)
def test_a_launcher_that_cannot_be_is_refused_before_anything_is_asked(name: str, texts: list[str], said: str) -> None:
    with pytest.raises(OptionInvalid) as refused:
        choose(name, texts, Path("/state/ours"))
    assert str(refused.value) == said
