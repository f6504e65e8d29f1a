"""Wire formats: gradients in fewer bytes. A table from the job file's word to what encodes and decodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from protos import job_pb2
from worker.compression.codec import Codec
from worker.compression.floats import Bfloat16Codec, Float16Codec, Float32Codec
from worker.compression.int8 import Int8Codec
from worker.compression.sign import SignCodec
from worker.compression.top_k import TopKCodec


class Format(NamedTuple):
    """One wire format."""

    make: Callable[[Any], Codec]  # from its options in the job file
    sums_well: bool  # a sum of such arrays is again one that the format holds well: it is worth encoding once more
    answer: Callable[[Any], Codec] | None = None  # how a parameter server's weights move, where not in the same format


FORMATS: dict[str, Format] = {
    "float32": Format(lambda options: Float32Codec(), sums_well=True),
    "float16": Format(lambda options: Float16Codec(), sums_well=True),
    "bfloat16": Format(lambda options: Bfloat16Codec(), sums_well=True),
    "int8": Format(lambda options: Int8Codec(), sums_well=True),
    "top_k": Format(lambda options: TopKCodec(options.fraction), sums_well=False),
    # Weights that move by one size for each row are too rough: the digits come to 61 % in place of 95 %.
    "sign": Format(lambda options: SignCodec(), sums_well=False, answer=lambda options: Int8Codec()),
}


def kind_of(wire_format: job_pb2.WireFormat) -> str:
    """The format's word; float32 where none is named."""
    return str(wire_format.WhichOneof("kind") or "float32")


def make_codec(wire_format: job_pb2.WireFormat) -> Codec:
    """A codec of the format a resolved job names, with scratch memory of its own."""
    kind = kind_of(wire_format)
    return FORMATS[kind].make(getattr(wire_format, kind))


def make_answer_codec(wire_format: job_pb2.WireFormat) -> Codec:
    """As `make_codec`, of what a parameter server answers pushes of the format with."""
    kind = kind_of(wire_format)
    return (FORMATS[kind].answer or FORMATS[kind].make)(getattr(wire_format, kind))
