"""From the message that a worker sent to the push that a shard takes.

Rules: nothing is changed here, and what cannot be read is Refused.
"""

from protos import parameter_server_pb2 as pb
from worker.server.published import ShardWire
from worker.server.pushes import Push, Refused
from worker.wire import as_array


def read_push(head: pb.ExchangeRequest, payload: memoryview, worker: int, wire: ShardWire | None) -> Push:
    """The push on the stream of this worker; `wire` is for a lossy wire format, None for float32. Raises Refused."""
    if head.worker != worker:
        raise Refused(f"worker {head.worker} pushed on the stream of worker {worker}")
    if wire:
        gradient = wire.gradient(head, payload)
    elif len(payload) % 4:
        raise Refused(f"worker {worker}, step {head.step}, offset {head.offset}: {len(payload)} bytes of float32")
    else:
        gradient = as_array(payload)
    return Push(
        head.worker, head.generation, head.step, head.offset, head.samples, head.learning_rate, gradient,
        tuple(head.totals), head.share_samples, tuple(head.guests),
    )  # fmt: skip
