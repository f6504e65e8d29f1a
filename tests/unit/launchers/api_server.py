"""A Kubernetes API server of memory, on loopback: as much of it as the launcher uses, answering as a real one does.

Rules: objects are kept as they came, but for what a server adds (uid, status). Tests write `status` as the operator and
kubelets do. An MPIJob that breaks the operator's schema is refused, as the server refuses it, and so is a call that it
does not know. `down` lets every call fail as behind a proxy whose server is away.
"""

import json
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jsonschema
import yaml

SCHEMA = json.loads((Path(__file__).parents[2] / "golden" / "kubernetes" / "mpijob_v2beta1.schema.json").read_text())
NAMESPACE = "vision"
MPI_JOBS = f"/apis/kubeflow.org/v2beta1/namespaces/{NAMESPACE}/mpijobs"
SECRETS = f"/api/v1/namespaces/{NAMESPACE}/secrets"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"


class Cluster:
    """What the server holds: collections by path, objects by name."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, dict[str, Any]]] = {MPI_JOBS: {}, SECRETS: {}, PODS: {}}
        self.graces: list[str] = []  # of deleted pods, in seconds; empty where it was left to them
        self.down = False
        self.forbidden: set[str] = set()
        self.url = ""

    def condition(self, name: str, kind: str) -> None:
        """What the operator writes when an MPIJob gets so far."""
        status = self.objects[MPI_JOBS][name].setdefault("status", {})
        status.setdefault("conditions", []).append({"type": kind, "status": "True", "reason": f"MPIJob{kind}"})

    def pod(self, job: str, role: str, **status: Any) -> None:
        """What the operator and a kubelet make of one of its pods."""
        template = self.objects[MPI_JOBS][job]["spec"]["mpiReplicaSpecs"][role.capitalize()]["template"]
        labels = template["metadata"]["labels"] | {"training.kubeflow.org/job-role": role}
        name = f"{job}-{role}"
        self.objects[PODS][name] = {"metadata": {"name": name, "labels": labels}, "status": status}

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> tuple[int, Any]:
        if self.down:
            return 503, _status("the server is currently unable to handle the request")
        if path == "/api/v1/nodes":
            nodes = [{"metadata": {"name": name}, "status": {"allocatable": {"cpu": "3920m"}}} for name in ("a", "b")]
            return (403, _status("nodes is forbidden")) if path in self.forbidden else (200, {"items": nodes})
        collection, _, name = (path, "", "") if path in self.objects else path.rpartition("/")
        if collection not in self.objects or path in self.forbidden:
            return 404, _status("the server could not find the requested resource")
        objects = self.objects[collection]
        if method == "POST":
            return self._create(collection, objects, body)
        if not name:
            chosen = {
                key: value for key, value in objects.items() if _matches(value, query.get("labelSelector", [""])[0])
            }
            if method == "DELETE":
                for key in chosen:
                    del objects[key]
                    self.graces += query.get("gracePeriodSeconds", [""])
            return 200, {"items": list(chosen.values())}
        if name not in objects:
            return 404, _status(f'{collection.rpartition("/")[2]} "{name}" not found')
        if method == "PATCH":
            objects[name]["metadata"] |= body["metadata"]
        if method == "DELETE":
            uid = objects.pop(name)["metadata"]["uid"]
            self.objects[SECRETS] = {key: each for key, each in self.objects[SECRETS].items() if not _owned(each, uid)}
            return 200, _status("deleted")
        return 200, objects[name]

    def _create(self, collection: str, objects: dict[str, dict[str, Any]], body: dict[str, Any]) -> tuple[int, Any]:
        name = body["metadata"]["name"]
        if collection == MPI_JOBS:
            try:
                jsonschema.validate(body, SCHEMA)
            except jsonschema.ValidationError as fault:
                return 422, _status(f'MPIJob.kubeflow.org "{name}" is invalid: {fault.message}')
        if name in objects:
            return 409, _status(f'"{name}" already exists')
        objects[name] = body | {"metadata": body["metadata"] | {"uid": str(uuid.uuid4())}}
        return 201, objects[name]


def _status(message: str) -> dict[str, Any]:
    return {"kind": "Status", "apiVersion": "v1", "message": message}


def _owned(thing: dict[str, Any], uid: str) -> bool:
    return any(owner["uid"] == uid for owner in thing["metadata"].get("ownerReferences", []))


def _matches(thing: dict[str, Any], selector: str) -> bool:
    labels = thing["metadata"].get("labels", {})
    wanted = [word.partition("=") for word in selector.split(",") if word]
    return all(key in labels and (not equals or labels[key] == value) for key, equals, value in wanted)


@contextmanager
def api_server(folder: Path) -> Iterator[Cluster]:
    """A server, with folder/config for the client."""
    cluster = Cluster()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            url = urlsplit(self.path)
            status, answer = cluster.answer(self.command, url.path, parse_qs(url.query), body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PATCH = do_DELETE = _handle  # the names that the base class looks for

        def log_message(self, *_: object) -> None:
            """Nobody reads it."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    cluster.url = f"http://127.0.0.1:{server.server_port}"
    (folder / "config").write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "here",
                "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
                "clusters": [{"name": "here", "cluster": {"server": cluster.url}}],
                "users": [{"name": "me", "user": {}}],
            }
        )
    )
    try:
        yield cluster
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
