"""A push to a parameter server, in each wire format: taken, or refused, and then the shard is as it was before.

The first byte chooses the format, the rest is the message.
"""

from __future__ import annotations

import numpy as np
from google.protobuf.message import DecodeError

from protos import job_pb2
from protos import parameter_server_pb2 as pb
from worker.compression import make_codec
from worker.compression.codec import encode as encode_values
from worker.compression.codec import encoded_bytes
from worker.optimizers import make_optimizer
from worker.server.published import open_wire
from worker.server.push_reader import read_push
from worker.server.pushes import Refused, ShardSetup
from worker.server.shard import Shard
from worker.wire import decode, encode

COUNT, CHUNK, WORKERS, SAMPLES, RATE = 20, 12, 2, 7, 0.1
GRADIENT = pb.ExchangeRequest.GRADIENT_FIELD_NUMBER
OPTIMIZER = make_optimizer(job_pb2.Optimizer(sgd=job_pb2.SgdOptimizer(learning_rate=RATE)))
FORMATS = [job_pb2.WireFormat(**{word: {}}) for word in ("float32", "float16", "bfloat16", "int8", "sign", "top_k")]
FORMATS[-1].top_k.fraction = 0.5
VALUES = np.linspace(-1, 1, CHUNK, dtype=np.float32)


def head(worker: int, offset: int) -> pb.ExchangeRequest:
    return pb.ExchangeRequest(
        worker=worker, step=1, offset=offset, samples=SAMPLES, share_samples=3, learning_rate=RATE, generation=1,
        totals=(1.0, 2.0) if offset == 0 else (),
    )  # fmt: skip


def message(wire_format: job_pb2.WireFormat, worker: int, offset: int) -> bytes:
    values = VALUES[: min(CHUNK, COUNT - offset)]
    if wire_format.WhichOneof("kind") != "float32":
        codec = make_codec(wire_format)
        encoded = np.empty(encoded_bytes(codec, len(values)), np.uint8)
        encode_values(codec, values, encoded)
        values = encoded
    return encode(head(worker, offset), GRADIENT, values)


SEEDS = [
    bytes([number]) + message(wire_format, 1, offset)
    for number, wire_format in enumerate(FORMATS)
    for offset in (0, CHUNK)
]


def read(data: bytes) -> None:
    wire_format = FORMATS[data[0] % len(FORMATS)] if data else FORMATS[0]
    weights = np.linspace(-1, 1, COUNT, dtype=np.float32)
    setup = ShardSetup(COUNT, "digest", WORKERS, chunk_elements=CHUNK)
    shard = Shard(setup, OPTIMIZER, weights, OPTIMIZER.init(COUNT, np.float32))
    wire = open_wire(shard, wire_format)
    for worker in range(WORKERS):
        shard.join(worker, 1, COUNT, "digest")
    for offset in (0, CHUNK):  # so that the other's push completes a chunk
        shard.receive(read_push(*decode(pb.ExchangeRequest, GRADIENT, message(wire_format, 0, offset)), 0, wire), 0.0)
    before = shard.version, shard.fault, weights.tobytes()
    try:
        shard.receive(read_push(*decode(pb.ExchangeRequest, GRADIENT, data[1:]), 1, wire), 0.0)
    except (Refused, DecodeError):
        assert (shard.version, shard.fault, weights.tobytes()) == before
        return
    assert shard.fault is None
