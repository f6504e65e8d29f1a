"""An example of every layer there is, also of one that no test has heard of.

Settings that a job must give are the smallest that make sense; a sample has the shape that the layer says it takes.
"""

from protos import job_pb2
from protos.job_file import parse_job
from protos.rules import rule_of
from worker.engine.layers import LAYERS
from worker.engine.layers.layer import Takes, traits_of

SHAPES = {
    Takes.ANYTHING: (5, 4),
    Takes.IMAGES: (5, 4, 3),
    Takes.SEQUENCES: (5, 4),
    Takes.TOKENS: (5,),
    Takes.ROWS: (4,),
}
# Settings that are not numbers.
SETTINGS = {"residual": "layers: [{linear: {units: 4}}, tanh]"}
NUMBER = 3  # units, filters, the side of a window, the size of a vocabulary


def example(kind: str) -> tuple[str, tuple[int, ...]]:
    """The layer as a job file has it, and the shape of a sample."""
    options = job_pb2.Layer.DESCRIPTOR.fields_by_name[kind].message_type
    required = [f"{field.name}: {NUMBER}" for field in options.fields if rule_of(field).required]
    return f"{{{kind}: {{{SETTINGS.get(kind, ', '.join(required))}}}}}", SHAPES[traits_of(LAYERS[kind]).takes]


def from_text(text: str) -> job_pb2.Layer:
    """A layer of a resolved job."""
    job = f"{{data: {{train: {{built_in: digits}}}}, model: [{text}], loss: mean_squared_error, optimizer: sgd}}"
    return parse_job(job).model[0]
