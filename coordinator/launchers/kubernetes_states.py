"""What Kubernetes says of an MPIJob and its pods -> how far it is, our reason and one line.

Rules: tables; a word that is in none is passed on as it is. What keeps a pod from running counts before what the MPIJob
says of itself, which is only that it was created. {name}: of the MPIJob. {pod}: the pod. {why}: Kubernetes' own words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from coordinator.launchers.foreign import Phase, Seen

KEEPS_TRYING = "kubectl describe pod {pod} tells more"


class Row(NamedTuple):
    """What to make of a word of Kubernetes'."""

    phase: Phase
    reason: str
    message: str


# Why a container waits. Kubernetes tries again for ever; the coordinator gives up when its start deadline is over.
WAITING: Mapping[str, Row] = MappingProxyType(
    {
        "ContainerCreating": Row(Phase.STARTS, "Launching", "pod {pod} is being created"),
        "PodInitializing": Row(Phase.STARTS, "Launching", "pod {pod} is being created"),
        "ErrImagePull": Row(
            Phase.STARTS, "ImagePullBackOff", "pod {pod}: its image (--launcher-option image) cannot be pulled: {why}"
        ),
        "ImagePullBackOff": Row(
            Phase.STARTS, "ImagePullBackOff", "pod {pod}: its image (--launcher-option image) cannot be pulled: {why}"
        ),
        "InvalidImageName": Row(
            Phase.STARTS, "InvalidImageName", "pod {pod}: {why}; see --launcher-option image"
        ),
        "CreateContainerConfigError": Row(Phase.STARTS, "PodConfigInvalid", "pod {pod}: {why}; " + KEEPS_TRYING),
        "CreateContainerError": Row(Phase.STARTS, "PodConfigInvalid", "pod {pod}: {why}; " + KEEPS_TRYING),
        "RunContainerError": Row(Phase.STARTS, "PodConfigInvalid", "pod {pod}: {why}; " + KEEPS_TRYING),
        "CrashLoopBackOff": Row(
            Phase.STARTS, "PodCrashes", "pod {pod} ends again and again: kubectl logs --previous {pod}"
        ),
    }
)  # fmt: skip
# Why a pod has no node.
UNPLACED: Mapping[str, Row] = MappingProxyType(
    {
        "Unschedulable": Row(Phase.WAITS, "HeldForNodes", "pod {pod} waits for a node: {why}"),
        "SchedulingGated": Row(Phase.WAITS, "HeldForTurn", "pod {pod} is held back by a queue: {why}"),
        "SchedulerError": Row(Phase.WAITS, "HeldForNodes", "pod {pod} has no node, the scheduler failed: {why}"),
    }
)
# Why a container or a pod ended, where that is not the ranks' own doing.
TERMINATED: Mapping[str, Row] = MappingProxyType(
    {
        "OOMKilled": Row(
            Phase.ENDED, "OutOfMemory", "pod {pod} used more memory than it had: --launcher-option memory=MORE"
        ),
        "Evicted": Row(Phase.ENDED, "Preempted", "pod {pod} was evicted: {why}"),
        "Preempting": Row(Phase.ENDED, "Preempted", "pod {pod} gave way to one of higher priority"),
        "NodeLost": Row(Phase.ENDED, "NodeFailed", "the node of pod {pod} does not answer any more"),
        "NodeShutdown": Row(Phase.ENDED, "NodeFailed", "the node of pod {pod} was shut down"),
        "Terminated": Row(Phase.ENDED, "NodeFailed", "the node of pod {pod} was shut down"),
        "DeadlineExceeded": Row(Phase.ENDED, "TimeLimitReached", "pod {pod} ran for longer than it may"),
    }
)
# What the MPIJob says of itself; the last condition that is true counts.
CONDITIONS: Mapping[str, Row] = MappingProxyType(
    {
        "Created": Row(Phase.STARTS, "Launching", "MPIJob {name} was created, its pods are coming"),
        "Restarting": Row(Phase.STARTS, "Launching", "MPIJob {name} starts a pod again"),
        "Running": Row(Phase.RUNS, "Launching", "MPIJob {name} runs; its ranks are starting"),
        "Suspended": Row(Phase.WAITS, "HeldSuspended", "MPIJob {name} is suspended (spec.runPolicy.suspend)"),
        "Succeeded": Row(Phase.ENDED, "", ""),
        "Failed": Row(Phase.ENDED, "", ""),
    }
)  # fmt: skip
NO_OPERATOR = Row(
    Phase.WAITS, "HeldByOperator", "MPIJob {name} has not been looked at: does the MPI Operator run in this cluster?"
)
LEAVING = Row(Phase.RUNS, "Launching", "MPIJob {name} is gone and its pods are leaving")


def seen_of(name: str, mpi_job: Mapping[str, Any] | None, pods: Sequence[Mapping[str, Any]]) -> Seen:
    """What the API server says of an MPIJob, None where it was deleted, and of its pods, in our words."""
    conditions = (mpi_job or {}).get("status", {}).get("conditions", [])
    said = [each["type"] for each in conditions if each["status"] == "True" and each["type"] in CONDITIONS]
    own = LEAVING if mpi_job is None else CONDITIONS[said[-1]] if said else NO_OPERATOR
    if own.phase is Phase.ENDED:
        if said[-1] == "Failed":
            for row, pod, why in _troubles(pods):
                if row.phase is Phase.ENDED:
                    return _told(row, name, pod, why)
        return _told(own, name)
    if mpi_job is not None and own.phase is not Phase.RUNS:
        for row, pod, why in _troubles(pods):
            if row.phase is not Phase.ENDED and row.reason != "Launching":
                return _told(row, name, pod, why)
    return _told(own, name)


def _told(row: Row, name: str, pod: str = "", why: str = "") -> Seen:
    words = " ".join(why.split()) or "no more is said"
    return Seen(row.phase, row.reason, row.message.format(name=name, pod=pod, why=words))


def _troubles(pods: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Row, str, str]]:
    """What keeps pods from running, or ended them, with the pod's name and Kubernetes' words."""
    for pod in pods:
        name, status = pod["metadata"]["name"], pod.get("status", {})
        if (row := TERMINATED.get(status.get("reason", ""))) is not None:
            yield row, name, status.get("message", "")
        for condition in status.get("conditions", []):
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                why = condition.get("reason", "")
                yield UNPLACED.get(why, UNPLACED["Unschedulable"]), name, condition.get("message", why)
        for container in status.get("containerStatuses", []):
            state = container.get("state", {})
            if waiting := state.get("waiting"):
                unknown = Row(
                    Phase.STARTS, waiting.get("reason", "PodWaits"), "pod {pod} waits: {why}; " + KEEPS_TRYING
                )
                yield WAITING.get(waiting.get("reason", ""), unknown), name, waiting.get("message", "")
            if (ended := state.get("terminated")) and (row := TERMINATED.get(ended.get("reason", ""))):
                yield row, name, ended.get("message", "")
