"""What shape a stored sample has for a model: whether (height, width) is an image of one channel or a sequence.

Rules: decided by the layers that meet the sample, before there are any. Images are the rule; (time, features) it is
where layers that work along the last axis come first and none that takes images meets what they put out.
"""

from collections.abc import Iterator, Sequence

from protos import job_pb2
from worker.engine.layers import LAYERS
from worker.engine.layers.layer import Takes, traits_of


def implies_channel(layers: Sequence[job_pb2.Layer]) -> bool:
    """Whether samples stored as (height, width) are (height, width, 1) to these layers."""
    implied = True
    for takes in _met(layers):
        if takes is Takes.IMAGES:
            return True
        if takes is Takes.TOKENS:
            return False
        if takes is Takes.ROWS:
            break
        implied = implied and takes is not Takes.SEQUENCES
    return implied


def _met(layers: Sequence[job_pb2.Layer]) -> Iterator[Takes]:
    """What each layer takes, in their order, with what a residual layer holds."""
    for layer in layers:
        kind = layer.WhichOneof("kind") or ""
        yield traits_of(LAYERS.get(kind)).takes
        yield from _met(layer.residual.layers)
