"""The calls of the official Kubernetes client that the launcher makes, with what can go wrong in our words.

Rules: every call has a deadline. A refusal (400 to 499) is final, but for one that asks to come again later; whatever
else goes wrong may go well another time. What exists already was created by the same call before its answer was lost.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any, TypeVar

import urllib3.exceptions
from kubernetes import client, config

from coordinator.launchers.foreign import NoAnswer, SubmitRefused
from coordinator.launchers.local import LauncherMissing

CALL_SECONDS = 10.0
GROUP, VERSION, PLURAL = "kubeflow.org", "v2beta1", "mpijobs"
NOT_FOUND, CONFLICT, TOO_MANY = 404, 409, 429
REMEDY = "is the kubeconfig file right, and the cluster up?"

T = TypeVar("T")


class Api:
    """One namespace of the cluster that a kubeconfig file says, or else the pod we are in. LauncherMissing."""

    def __init__(self, namespace: str, kubeconfig: str | None, context: str | None) -> None:
        self._namespace = namespace
        try:
            if kubeconfig or context or not os.environ.get("KUBERNETES_SERVICE_HOST"):
                config.load_kube_config(kubeconfig, context)
            else:
                config.load_incluster_config()
        except (config.ConfigException, OSError) as fault:
            message = " ".join(str(fault).split())
            raise LauncherMissing(f"--launcher kubernetes: {message}: {REMEDY}") from None
        settings = client.Configuration.get_default_copy()
        settings.retries = False  # the caller tries again, and says so meanwhile
        connection = client.ApiClient(settings)
        self._custom, self._core = client.CustomObjectsApi(connection), client.CoreV1Api(connection)

    def cores(self) -> int:
        """What all nodes have for pods. LauncherMissing where the operator or an answer is."""
        try:
            self.mpi_jobs("")
            nodes = _plain(self._ask(lambda **how: self._core.list_node(_preload_content=False, **how)))
        except SubmitRefused as fault:
            remedy = "install the MPI Operator, and let this account list nodes and change MPIJobs, Secrets and pods"
            raise LauncherMissing(f"--launcher kubernetes: {fault}: {remedy}") from None
        except NoAnswer as fault:
            raise LauncherMissing(f"--launcher kubernetes: {fault}: {REMEDY}") from None
        return sum(int(float(_cores(node["status"]["allocatable"]["cpu"]))) for node in nodes["items"])

    def create(self, secret: dict[str, Any], mpi_job: dict[str, Any]) -> None:
        """Both, and the one goes when the other does. NoAnswer, SubmitRefused."""
        name = mpi_job["metadata"]["name"]
        self._create(lambda **how: self._core.create_namespaced_secret(self._namespace, secret, **how))
        try:
            self._create(lambda **how: self._custom.create_namespaced_custom_object(*self._mpi_jobs, mpi_job, **how))
        except SubmitRefused:
            self._delete(lambda **how: self._core.delete_namespaced_secret(name, self._namespace, **how))
            raise
        made = self._ask(lambda **how: self._custom.get_namespaced_custom_object(*self._mpi_jobs, name, **how))
        owner = {key: mpi_job[key] for key in ("apiVersion", "kind")} | {"name": name, "uid": made["metadata"]["uid"]}
        owned = {"metadata": {"ownerReferences": [owner]}}
        self._ask(lambda **how: self._core.patch_namespaced_secret(name, self._namespace, owned, **how))

    def mpi_jobs(self, selector: str) -> dict[str, dict[str, Any]]:
        """By name."""
        found = self._ask(
            lambda **how: self._custom.list_namespaced_custom_object(*self._mpi_jobs, label_selector=selector, **how)
        )
        return {item["metadata"]["name"]: item for item in found["items"]}

    def pods(self, selector: str) -> list[dict[str, Any]]:
        found = self._ask(
            lambda **how: self._core.list_namespaced_pod(
                self._namespace, label_selector=selector, _preload_content=False, **how
            )
        )
        items: list[dict[str, Any]] = _plain(found)["items"]
        return items

    def delete_mpi_job(self, name: str) -> None:
        self._delete(lambda **how: self._custom.delete_namespaced_custom_object(*self._mpi_jobs, name, **how))

    def delete_pods(self, selector: str, at_once: bool) -> None:
        """With the grace that they were given, or without."""
        grace = {"grace_period_seconds": 0} if at_once else {}
        self._delete(
            lambda **how: self._core.delete_collection_namespaced_pod(
                self._namespace, label_selector=selector, **grace, **how
            )
        )

    @property
    def _mpi_jobs(self) -> tuple[str, str, str, str]:
        return GROUP, VERSION, self._namespace, PLURAL

    def _create(self, call: Callable[..., object]) -> None:
        try:
            self._ask(call)
        except _Exists:
            return

    def _delete(self, call: Callable[..., object]) -> None:
        try:
            self._ask(call)
        except _Absent:
            return
        except SubmitRefused as fault:
            raise NoAnswer(str(fault)) from None

    def _ask(self, call: Callable[..., T]) -> T:
        try:
            return call(_request_timeout=CALL_SECONDS)
        except client.ApiException as fault:
            words = _words(fault)
            if fault.status == CONFLICT:
                raise _Exists(words) from None
            if fault.status == NOT_FOUND:
                raise _Absent(words) from None
            if 400 <= (fault.status or 0) < 500 and fault.status != TOO_MANY:
                raise SubmitRefused(words) from None
            raise NoAnswer(words) from None
        except (urllib3.exceptions.HTTPError, OSError) as fault:
            raise NoAnswer(" ".join(str(fault).split())) from None


class _Exists(SubmitRefused):
    """It was created before."""


class _Absent(SubmitRefused):
    """There is nothing of that name, or no such kind of object."""


def _plain(answer: Any) -> dict[str, Any]:
    """As the server said it: the client's own classes refuse what a newer server leaves out."""
    plain: dict[str, Any] = json.loads(answer.data)
    return plain


def _words(fault: client.ApiException) -> str:
    """The message of a Status object, or the reason of the HTTP answer."""
    try:
        message = json.loads(fault.body)["message"]
    except (TypeError, ValueError, KeyError):
        message = f"{fault.status} {fault.reason}"
    return " ".join(str(message).split())


def _cores(quantity: str) -> float:
    return float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)
