"""What each wire format costs: bytes and coding seconds an element, measured here on a vector of the job's length.

Rules: the names are those of the job file's schema, the codecs those of worker/compression. A format that no codec
writes by itself has no known cost, and no plan offers it.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any, Final

import numpy as np

from protos import job_pb2
from protos.rules import resolve, schema_of
from worker.compression import FORMATS, make_answer_codec, make_codec
from worker.compression.codec import BLOCK_ELEMENTS, Codec, encode_with_feedback, encoded_bytes
from worker.compression.codec import decode as decode_all
from worker.plan.choices import FLOAT32, WireFormat
from worker.plan.machine import undisturbed

MOST_ELEMENTS: Final = 1 << 20
REPETITIONS: Final = 5


def measure_formats(job: job_pb2.JobSpec, parameters: int) -> tuple[list[WireFormat], list[str]]:
    """The formats whose cost is known for a vector of so many elements, and the names of the others."""
    kinds: Any = schema_of(job_pb2.WireFormat())
    names = [kind.name for kind in kinds.oneofs_by_name["kind"].fields if kind.name != FLOAT32.name]
    elements = min(parameters, MOST_ELEMENTS)
    return [_measured(job, name, elements) for name in names if name in FORMATS], [n for n in names if n not in FORMATS]


def _measured(job: job_pb2.JobSpec, name: str, elements: int) -> WireFormat:
    settings, format_ = _settings(job, name), FORMATS[name]
    measured = _coded(name, make_codec(settings), elements, format_.sums_well)
    if not format_.answer:
        return measured
    return measured._replace(answer=_coded(name, make_answer_codec(settings), elements, format_.sums_well))


def _coded(name: str, codec: Codec, elements: int, sums_well: bool) -> WireFormat:
    vector = np.random.default_rng(0).standard_normal(elements).astype(np.float32)
    residual, decoded = np.zeros_like(vector), np.empty_like(vector)
    scratch = np.empty(min(elements, BLOCK_ELEMENTS), np.float32)
    encoded = np.empty(encoded_bytes(codec, elements), np.uint8)

    def encode() -> None:
        encode_with_feedback(codec, vector, np.float32(1), residual, encoded, scratch)

    def decode() -> None:
        decode_all(codec, encoded, decoded)

    return WireFormat(
        name, len(encoded) / elements, _seconds(encode) / elements, _seconds(decode) / elements, sums_well
    )


def _settings(job: job_pb2.JobSpec, name: str) -> Any:
    """The format as the job file has it, or with its defaults where the job file has another."""
    own: Any = getattr(job.sync, job.sync.WhichOneof("kind") or "all_reduce")
    if "wire_format" in schema_of(own).fields_by_name and own.wire_format.WhichOneof("kind") == name:
        return own.wire_format
    other: Any = job_pb2.AllReduceSync()
    getattr(other.wire_format, name).SetInParent()
    resolved: Any = resolve(job_pb2.JobSpec(sync=job_pb2.Sync(all_reduce=other)))
    return resolved.sync.all_reduce.wire_format


def _seconds(act: Callable[[], None]) -> float:
    taken = []
    for _ in range(REPETITIONS):
        began = perf_counter()
        act()
        taken.append(perf_counter() - began)
    return undisturbed(taken)
