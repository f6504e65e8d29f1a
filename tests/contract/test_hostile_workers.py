"""What a worker that does not belong, or does not keep to the protocol, can do to a parameter server: nothing.

Rows of the fault table (tests/mpi/test_fault_table.py), on real server processes with chunks of eight elements. A
stranger is refused with the reason and the others go on; what a worker itself does wrong ends the step for all of them
with its name. The weights are to the bit those without the bad message.
"""

import contextlib
import queue
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message

from protos import parameter_server_pb2 as pb
from worker.checkpoint import Checkpoint, write_checkpoint
from worker.server.process import ServerProcess, start_server_process
from worker.server.service import SERVICE
from worker.sync.parameter_server import ParameterServerExchange

FAULTY_SERVER = Path(__file__).with_name("faulty_server.py")
JOB = """{data: {train: {built_in: digits}}, model: [{dense: {units: 10}}], loss: softmax_cross_entropy,
          optimizer: {sgd: {learning_rate: 0.5}}}"""
TOKEN, DIGEST, GENERATION, RATE = "a token of this test", "ab" * 32, 3, 0.5
COUNT, CHUNK = 28, 8  # four chunks, the last one short
OFFSETS = tuple(range(0, COUNT, CHUNK))
START = np.arange(COUNT, dtype=np.float32)
BEYOND_THE_LIMIT = bytes(65 << 20)
Code = grpc.StatusCode
UNLIMITED = [("grpc.max_send_message_length", -1)]


def weights_after(step: int) -> np.ndarray:
    """Every gradient is of ones: exact in float32."""
    return START - np.float32(RATE * step)


def gradient(count: int, **elements: float) -> bytes:
    """Of ones but for `e3=...`."""
    ones = np.ones(count, "<f4")
    for name, value in elements.items():
        ones[int(name[1:])] = value
    return ones.tobytes()


def push(worker: int = 1, step: int = 1, offset: int = 0, **changes: object) -> pb.ExchangeRequest:
    terms = {"generation": GENERATION, "samples": 2, "learning_rate": RATE, "share_samples": 1}
    own = {"gradient": gradient(max(0, min(CHUNK, COUNT - offset))), "totals": (1.0, 1.0) if offset == 0 else ()}
    return pb.ExchangeRequest(**({"worker": worker, "step": step, "offset": offset} | terms | own | changes))


def hello(worker: int = 1, generation: int = GENERATION) -> pb.ExchangeRequest:
    return pb.ExchangeRequest(worker=worker, generation=generation)


def joining(**changes: object) -> pb.JoinRequest:
    member = {"worker": 1, "generation": GENERATION, "parameter_count": COUNT, "layout_digest": DIGEST}
    return pb.JoinRequest(**(member | changes))


class Client:
    """Speaks to a server message by message."""

    def __init__(self, address: str, token: str | None = TOKEN) -> None:
        self.metadata = () if token is None else (("authorization", f"Bearer {token}"),)
        self.channel = grpc.insecure_channel(address, UNLIMITED)
        self.outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        stream = self.channel.stream_stream(f"/{SERVICE}/Exchange")
        self.call = stream(iter(self.outgoing.get, None), metadata=self.metadata, timeout=60)

    def send(self, *messages: Message | bytes) -> None:
        for message in messages:
            self.outgoing.put(message if isinstance(message, bytes) else message.SerializeToString())

    def next(self) -> pb.ExchangeResponse:
        return pb.ExchangeResponse.FromString(next(self.call))

    def enter(self, worker: int) -> None:
        self.channel.unary_unary(f"/{SERVICE}/Join", pb.JoinRequest.SerializeToString)(
            joining(worker=worker), metadata=self.metadata, timeout=60
        )
        self.send(hello(worker))
        self.next()

    def refusal(self) -> grpc.Call:
        """How the stream ends; None where it only does."""
        with pytest.raises(grpc.RpcError) as refused:
            for _ in self.call:
                pass
        return refused.value

    def weights(self) -> np.ndarray:
        pull = self.channel.unary_stream(
            f"/{SERVICE}/Pull", pb.PullRequest.SerializeToString, pb.PullResponse.FromString
        )
        chunks = pull(pb.PullRequest(), metadata=self.metadata, timeout=60)
        return np.concatenate([np.frombuffer(chunk.data, "<f4") for chunk in chunks])

    def close(self) -> None:
        self.outgoing.put(None)
        self.call.cancel()
        self.channel.close()


class Servers:
    """Server processes, two started ahead of whoever takes them."""

    def __init__(self, folder: Path) -> None:
        self.job, self.start_file = folder / "job.yaml", folder / "start.safetensors"
        self.job.write_text(JOB)
        write_checkpoint(self.start_file, Checkpoint(0, 0, 0, DIGEST, [], START, {}))
        self.pool = ThreadPoolExecutor(2)
        self.ahead: deque[Future[ServerProcess]] = deque()
        self.taken: list[ServerProcess] = []

    def start(self, workers: int = 2) -> ServerProcess:
        program = (sys.executable, str(FAULTY_SERVER), "never", "-", "serve-parameters")
        return start_server_process(
            self.job, self.start_file, workers, GENERATION, TOKEN, program=program, timeout_seconds=60
        )

    def take(self) -> str:
        """The address of a fresh one for two workers."""
        while len(self.ahead) < 3:
            self.ahead.append(self.pool.submit(self.start))
        self.taken.append(self.ahead.popleft().result())
        return self.taken[-1].address

    def stop(self) -> None:
        for server in [*self.taken, *(future.result() for future in self.ahead)]:
            server.stop()
        self.pool.shutdown()


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(FAULTY_SERVER.parents[2]))
        made = Servers(tmp_path_factory.mktemp("servers"))
        yield made
        made.stop()


class Good:
    """Two good workers of one server, who make a step after each stranger."""

    def __init__(self, address: str) -> None:
        self.address, self.steps = address, 0
        self.arrays = [START.copy() for _ in range(2)]
        self.workers = [
            ParameterServerExchange(
                [address], worker, 2, GENERATION, TOKEN, DIGEST, weights, np.ones(COUNT, np.float32), np.zeros(2)
            )
            for worker, weights in enumerate(self.arrays)
        ]
        for worker in self.workers:
            worker.join()

    def step(self) -> None:
        self.steps += 1
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda worker: worker.step(self.steps, 2, RATE), self.workers))
        for weights in self.arrays:
            np.testing.assert_array_equal(weights, weights_after(self.steps))


@pytest.fixture(scope="module")
def good(servers: Servers) -> Iterator[Good]:
    workers = Good(servers.take())
    yield workers
    for worker in workers.workers:
        worker.leave()


def stream_of(*messages: Message | bytes, token: str | None = TOKEN) -> Callable[[str], grpc.Call]:
    """A stranger's stream."""

    def act(address: str) -> grpc.Call:
        with contextlib.closing(Client(address, token)) as client:
            client.send(*messages)
            return client.refusal()

    return act


def call_of(request: Message, method: str = "Join", token: str | None = TOKEN) -> Callable[[str], grpc.Call]:
    """A stranger's call."""

    def act(address: str) -> grpc.Call:
        metadata = () if token is None else (("authorization", f"Bearer {token}"),)
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary(f"/{SERVICE}/{method}", type(request).SerializeToString)(
                request, metadata=metadata, timeout=60
            )
        return refused.value

    return act


NO_TOKEN = "the job's token is missing or wrong"
STRANGERS = {
    "another job's token": (stream_of(hello(), token="another"), Code.UNAUTHENTICATED, NO_TOKEN),
    "no token": (stream_of(hello(), token=None), Code.UNAUTHENTICATED, NO_TOKEN),
    "join without a token": (call_of(joining(), token=None), Code.UNAUTHENTICATED, NO_TOKEN),
    "pull with another token": (call_of(pb.PullRequest(), "Pull", "another"), Code.UNAUTHENTICATED, NO_TOKEN),
    "leave without a token": (call_of(pb.LeaveRequest(worker=1), "Leave", None), Code.UNAUTHENTICATED, NO_TOKEN),
    "another shape": (
        call_of(joining(parameter_count=27)), Code.FAILED_PRECONDITION, "worker 1 has a model of 27 parameters",
    ),
    "another layout": (
        call_of(joining(layout_digest="cd" * 32)), Code.FAILED_PRECONDITION, "and layout cdcdcdcdcdcd, the parameter",
    ),
    "a number too high": (call_of(joining(worker=2)), Code.INVALID_ARGUMENT, "worker 2 does not exist: there are 2"),
    "a negative number": (call_of(joining(worker=-2)), Code.INVALID_ARGUMENT, "worker -2 does not exist"),
    "a stream of a number too high": (stream_of(hello(2)), Code.INVALID_ARGUMENT, "worker 2 does not exist"),
    "a number used twice": (
        stream_of(hello(1)), Code.FAILED_PRECONDITION, "worker 1 has a stream already: two processes have the same",
    ),
    "join of an earlier launch": (call_of(joining(generation=2)), Code.FAILED_PRECONDITION, "of an earlier launch"),
    "join of a later launch": (call_of(joining(generation=4)), Code.FAILED_PRECONDITION, "of a later launch"),
    "push of an earlier launch": (
        stream_of(push(generation=2)), Code.FAILED_PRECONDITION, "worker 1 is of an earlier launch: generation 2",
    ),
    "push of a later launch": (stream_of(push(generation=4)), Code.FAILED_PRECONDITION, "of a later launch"),
    "no protobuf": (stream_of(b"\xff\xff\xff"), Code.INVALID_ARGUMENT, "the message ends inside a number"),
    "beyond the message limit": (stream_of(BEYOND_THE_LIMIT), Code.RESOURCE_EXHAUSTED, "larger than max"),
}  # fmt: skip


@pytest.mark.parametrize("row", STRANGERS)
def test_a_stranger_is_refused_with_the_reason_and_the_others_go_on(good: Good, row: str) -> None:
    act, code, words = STRANGERS[row]
    began = time.monotonic()
    refused = act(good.address)
    seconds = time.monotonic() - began
    print(f"row stranger: {row} {seconds:5.1f} s  {refused.code().name}: {refused.details()}")
    assert refused.code() is code
    assert words in refused.details()
    good.step()


@pytest.mark.parametrize("kind", ["connection", "stream"])
def test_who_opens_and_says_nothing_holds_up_nobody(good: Good, kind: str) -> None:
    host, port = good.address.split(":")
    silent = socket.create_connection((host, int(port))) if kind == "connection" else Client(good.address)
    with contextlib.closing(silent):
        began = time.monotonic()
        good.step()
        print(f"row stranger: a half-open {kind} {time.monotonic() - began:5.1f} s  the others' step is made meanwhile")


ORDERS = {
    "chunks out of order": (16, 0, 24, 8),
    "chunks duplicated": (0, 0, 8, 16, 16, 8, 24, 24),
    "a step repeated whole": (*OFFSETS, *OFFSETS),
}


@pytest.mark.parametrize("row", ORDERS)
def test_in_any_order_and_number_each_chunk_is_applied_once(servers: Servers, row: str) -> None:
    address = servers.take()
    with contextlib.closing(Client(address)) as one, contextlib.closing(Client(address)) as other:
        one.enter(0)
        other.enter(1)
        began = time.monotonic()
        one.send(*(push(0, offset=offset) for offset in OFFSETS))
        other.send(*(push(1, offset=offset) for offset in ORDERS[row]), hello(1))
        while (answer := other.next()).step:
            expected = weights_after(1)[answer.offset : answer.offset + CHUNK]
            np.testing.assert_array_equal(np.frombuffer(answer.weights, "<f4"), expected)
        for _ in OFFSETS:
            one.next()
        print(f"row worker: {row} {time.monotonic() - began:5.1f} s  each applied once")
        np.testing.assert_array_equal(one.weights(), weights_after(1))


INVALID, CONFLICT = Code.INVALID_ARGUMENT, Code.FAILED_PRECONDITION
HERE = "worker 1 of 2, step 1, offset 0: "
WRONGS = {
    "NaN": (push(gradient=gradient(8, e3=np.nan)), INVALID, HERE + "the gradient is not finite at element 3"),
    "infinity": (push(offset=8, gradient=gradient(8, e7=-np.inf)), INVALID, "is not finite at element 15"),
    "an offset within a chunk": (push(offset=5, gradient=gradient(8)), INVALID, "offset 5: no chunk begins there"),
    "an offset beyond the vector": (push(offset=32, gradient=b""), INVALID, "offset 32: no chunk begins there"),
    "a negative offset": (push(offset=-8, gradient=gradient(8)), INVALID, "offset -8: no chunk begins there"),
    "a chunk cut short": (push(gradient=gradient(7)), INVALID, HERE + "7 elements, the chunk has 8"),
    "a chunk cut within an element": (push(gradient=bytes(31)), INVALID, "31 bytes of float32"),
    "an empty chunk": (push(gradient=b""), INVALID, HERE + "0 elements, the chunk has 8"),
    "a chunk too large": (push(gradient=gradient(9)), INVALID, HERE + "9 elements, the chunk has 8"),
    "a chunk beyond the message limit": (BEYOND_THE_LIMIT, Code.RESOURCE_EXHAUSTED, "larger than max"),
    "a step of the future": (push(step=3), CONFLICT, "step 3, offset 0: the shard is at step 1"),
    "a step of the past": (push(step=-1), CONFLICT, "step -1, offset 0: the shard is at step 1"),
    "a gradient of step 0": (push(step=0), CONFLICT, "step 0, offset 0: the shard is at step 1"),
    "an earlier generation": (push(generation=2), CONFLICT, "of an earlier launch: generation 2"),
    "a later generation": (push(generation=4), CONFLICT, "of a later launch: generation 4"),
    "another's number": (push(worker=0), INVALID, "worker 0 pushed on the stream of worker 1"),
    "totals too many": (push(totals=(1, 2, 3)), INVALID, "3 totals, but worker 0 of 2 sent 2"),
    "totals on another chunk": (push(offset=8, totals=(1, 2)), INVALID, "totals ride on the chunk at 0 only"),
    "no samples": (push(samples=0, share_samples=0), INVALID, "0 samples in the batch, at least 1 is needed"),
    "a negative sample count": (push(samples=-2), INVALID, "-2 samples in the batch, at least 1 is needed"),
    "a huge sample count": (push(samples=2**62), INVALID, "samples 4611686018427387904, but worker 0 of 2 said 2"),
    "a share beyond the batch": (push(share_samples=3), INVALID, "a share of 3 samples in a batch of 2"),
    "a negative share": (push(share_samples=-1), INVALID, "a share of -1 samples in a batch of 2"),
    "a learning rate that is NaN": (push(learning_rate=np.nan), INVALID, "learning rate nan is not a finite number"),
    "another learning rate": (push(learning_rate=1.0), INVALID, "learning rate 1.0, but worker 0 of 2 said 0.5"),
    "no protobuf": (b"\xff\xff\xff", INVALID, "the message ends inside a number"),
    "a message cut short": (push().SerializeToString()[:-5], INVALID, "field 15 says 32 bytes, 27 follow"),
}


@pytest.mark.parametrize("row", WRONGS)
def test_what_a_worker_does_wrong_ends_the_step_for_all_with_its_name(servers: Servers, row: str) -> None:
    message, code, words = WRONGS[row]
    address = servers.take()
    with contextlib.closing(Client(address)) as one, contextlib.closing(Client(address)) as wrong:
        one.enter(0)
        wrong.enter(1)
        one.send(*(push(0, offset=offset) for offset in OFFSETS), hello(0))
        assert one.next().step == 0  # what came before on this stream is taken
        began = time.monotonic()
        wrong.send(message)
        refused, told = wrong.refusal(), one.refusal()
        print(f"row worker: {row} {time.monotonic() - began:5.1f} s  {refused.code().name}: {told.details()}")
        assert refused.code() is code
        assert words in refused.details()
        assert told.code() is Code.ABORTED
        why = "its stream ended" if code is Code.RESOURCE_EXHAUSTED else f"its push was refused: {refused.details()}"
        assert told.details() == f"worker 1 of 2 is gone at step 1: {why}"
        np.testing.assert_array_equal(one.weights(), START)


def test_who_pushes_without_having_joined_takes_nobodys_place(servers: Servers) -> None:
    address = servers.take()
    began = time.monotonic()
    refused = stream_of(push(1))(address)
    print(f"row stranger: a push without a join {time.monotonic() - began:5.1f} s  {refused.details()}")
    assert refused.code() is CONFLICT
    assert "worker 1 of 2 has not joined" in refused.details()
    good = Good(address)
    good.step()
    for worker in good.workers:
        worker.leave()
