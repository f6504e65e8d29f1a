"""The layers, under the names the job file gives them: those of the oneof in `Layer` of protos/job.proto.

A new layer is a message in job.proto with its line in that oneof, `CubeLayer cube = 99`, and a class `Cube` that keeps
to layer.py, in any file of this folder. Nothing else names it.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Final

from protos import job_pb2
from worker.engine.layers.layer import Layer


def find_layers() -> dict[str, type[Layer]]:
    """Every kind of the oneof with the class that its message is named after."""
    classes: dict[str, Any] = {}
    for module in iter_modules(__path__, f"{__name__}."):
        classes |= vars(import_module(module.name))
    kinds = job_pb2.Layer.DESCRIPTOR.oneofs_by_name["kind"].fields
    named = {kind.name: kind.message_type.name.removesuffix("Layer") for kind in kinds if kind.message_type}
    if missing := {kind for kind, name in named.items() if name not in classes}:
        raise ImportError(f"no file of worker/engine/layers has a class for {', '.join(sorted(missing))}")
    return {kind: classes[name] for kind, name in named.items()}


LAYERS: Final = find_layers()
