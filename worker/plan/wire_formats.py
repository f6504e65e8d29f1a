"""What each wire format costs: bytes and coding seconds an element, measured here on a vector of the job's length.

Rules: the names are those of the job file's schema, the codecs those of worker/compression. Formats that code each
element alike are measured on noise; PowerSGD on noise in the shapes of the job's own matrices, as a rank's slice cuts
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, Final

import numpy as np

from protos import job_pb2
from protos.rules import resolve, schema_of
from worker.compression import FORMATS, kind_of, make_answer_codec, make_codec
from worker.compression.codec import BLOCK_ELEMENTS, Codec, encode_with_feedback, encoded_bytes
from worker.compression.codec import decode as decode_all
from worker.compression.power_sgd import Factors, factor_lengths, matrices_within
from worker.engine.params import ParameterSlot
from worker.plan.choices import FLOAT32, WireFormat
from worker.plan.machine import FLOAT32_BYTES, undisturbed
from worker.sync.all_reduce import slice_bounds

MOST_ELEMENTS: Final = 1 << 20
REPETITIONS: Final = 5


def measure_formats(job: job_pb2.JobSpec, slots: Sequence[ParameterSlot], slices: int) -> list[WireFormat]:
    """Every format but float32, for the model with these parameters, of which each of `slices` ranks sends its part."""
    kinds: Any = schema_of(job_pb2.WireFormat())
    names = [kind.name for kind in kinds.oneofs_by_name["kind"].fields if kind.name != FLOAT32.name]
    elements = min(slots[-1].stop, MOST_ELEMENTS)
    return [
        _measured(job, name, elements) if name in FORMATS else _factored(_settings(job, name), slots, slices)
        for name in names
    ]


def _factored(settings: job_pb2.WireFormat, slots: Sequence[ParameterSlot], slices: int) -> WireFormat:
    parameters, rank = slots[-1].stop, settings.power_sgd.rank
    cuts = slice_bounds(parameters, slices)
    lengths = [factor_lengths(matrices_within(slots, cut, rank), cut[1] - cut[0], rank) for cut in cuts]
    first, second = (sum(each) / parameters for each in zip(*lengths, strict=True))

    start, stop = cuts[0]
    elements = min(stop, start + MOST_ELEMENTS) - start
    factors = Factors(slots, (start, start + elements), rank)
    noise = np.random.default_rng(0).standard_normal(elements).astype(np.float32)
    total = np.empty_like(noise)

    def encode() -> None:
        factors.begin(noise, 1)
        factors.turn()

    encode_each = _seconds(encode) / elements
    decode_each = _seconds(lambda: factors.end(total, 1)) / elements
    return WireFormat(
        kind_of(settings), FLOAT32_BYTES * (first + second), encode_each, decode_each, True, factors=(first, second)
    )


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
