"""Hatch build hook: compiles protos/*.proto into Python stubs at install and build time.

The stubs are written beside their .proto files, are never committed, and go into the wheel as artifacts
(pyproject.toml). `protoc -I.` from the project root makes them import each other as `from protos import x_pb2`,
so nothing is rewritten afterwards.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


def compile_protos(root: Path) -> None:
    """Run protoc on every .proto file under root/protos, raising RuntimeError if it refuses one."""
    from grpc_tools import protoc

    well_known = importlib.resources.files("grpc_tools") / "_proto"
    sources = sorted(str(path.relative_to(root)) for path in (root / "protos").glob("*.proto"))
    outputs = [f"--{kind}_out={root}" for kind in ("python", "pyi", "grpc_python")]
    status = protoc.main(["protoc", f"-I{root}", f"-I{well_known}", *outputs, *sources])
    if status != 0:
        raise RuntimeError(f"protoc failed with status {status} on {', '.join(sources)}; its message is above")


class ProtocHook(BuildHookInterface):  # type: ignore[type-arg]  # hatchling's generic parameter is its own configuration
    """Compiles the stubs before hatchling collects files, for editable installs and wheels alike."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        compile_protos(Path(self.root))
