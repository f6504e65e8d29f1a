"""Wire formats through real gRPC: nothing is lost but deferred, workers agree to the bit, bad payloads are refused."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from protos import job_pb2, rules
from protos import parameter_server_pb2 as pb
from protos.job_file import parse_job
from tests.contract.test_parameter_server import COUNT, DECAYED, DIGEST, RATE, TOKEN, Serving, first_weights
from worker.checkpoint import Checkpoint
from worker.compression import FORMATS, make_codec
from worker.compression.codec import encode, encoded_bytes
from worker.errors import TrainingFault
from worker.server.modes import MODES
from worker.server.process import Part
from worker.server.published import open_wire
from worker.server.service import SERVICE, ParameterServer
from worker.server.supervision import SupervisedServer
from worker.sync.parameter_server import ParameterServerExchange
from worker.sync.server_wire import Lossy

LOSSY = [name for name in FORMATS if name != "float32"]
SAMPLES = 48
CHUNK = 300


def wire_format(name: str) -> job_pb2.WireFormat:
    made = job_pb2.WireFormat()
    getattr(made, name).SetInParent()
    if name == "top_k":
        made.top_k.fraction = 0.1
    return made


class LossyServing(Serving):
    """A parameter server that takes one wire format."""

    def __init__(self, name: str, workers: int, **setup: object) -> None:
        self.wire_format = wire_format(name)
        super().__init__("sgd", workers, **setup)

    async def _make(self) -> ParameterServer:
        self.wire = open_wire(self.shard, self.wire_format)
        return ParameterServer(self.shard, TOKEN, wire=self.wire)


@pytest.fixture
def serving() -> Iterator[Callable[..., LossyServing]]:
    with contextlib.ExitStack() as stack:

        def start(name: str, workers: int = 1, **setup: object) -> LossyServing:
            server = LossyServing(name, workers, **setup)
            stack.callback(server.stop)
            return server

        yield start


class Worker:
    """One worker's arrays and its connections."""

    def __init__(self, addresses: list[str], name: str, number: int, workers: int, **settings: object) -> None:
        self.weights, self.gradient = first_weights(), np.zeros(COUNT, np.float32)
        self.residual = np.zeros(COUNT, np.float32)
        self.number = number
        self.pushed = np.zeros(COUNT)  # sums of the gradients divided by the batch, exact
        lossy = None if name == "float32" else Lossy(wire_format(name), self.residual)
        self.exchange = ParameterServerExchange(
            addresses, number, workers, 3, TOKEN, DIGEST, self.weights, self.gradient, np.zeros(2),
            timeout_seconds=60, lossy=lossy, **settings,
        )  # fmt: skip

    def step(self, step: int) -> None:
        self.gradient[:] = np.random.default_rng((self.number, step)).standard_normal(COUNT) * SAMPLES
        samples = SAMPLES if step % 3 else 7  # a short batch now and then
        self.exchange.step(step, samples, RATE)
        self.pushed += self.gradient.astype(np.float64) / samples

    def take_whole(self) -> None:
        self.weights[:] = self.exchange.pull(state=False, publish=True)["parameters"]


def train(servers: list[LossyServing], name: str, workers: int, steps: int) -> list[Worker]:
    """Every worker's `steps`, with whole weights taken after the fifth; nobody has left yet."""
    running = [Worker([server.address for server in servers], name, number, workers) for number in range(workers)]
    meet = threading.Barrier(workers)

    def run(worker: Worker) -> None:
        assert worker.exchange.join() == 0
        for step in range(1, steps + 1):
            worker.step(step)
            if step == 5:
                meet.wait(60)
                worker.take_whole()

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run, running))
    return running


@pytest.mark.parametrize("mode", ["synchronous", "bounded_staleness"])
@pytest.mark.parametrize("name", LOSSY)
def test_weights_move_by_all_gradients_but_what_the_residuals_hold(serving, name: str, mode: str) -> None:
    parts = ((0, 600), (600, COUNT))
    servers = [serving(name, 3, start=start, stop=stop, decayed=(), mode=MODES[mode]) for start, stop in parts]
    workers = train(servers, name, 3, 12)
    true = workers[0].exchange.pull(state=False)["parameters"]
    unsent = sum(worker.residual.astype(np.float64) for worker in workers)
    expected = first_weights() - RATE * (sum(worker.pushed for worker in workers) - unsent)
    np.testing.assert_allclose(true, expected, rtol=0, atol=2e-5)
    assert unsent.any()
    if mode == "synchronous":
        for worker in workers[1:]:
            np.testing.assert_array_equal(worker.weights, workers[0].weights)
    for worker in workers:
        worker.take_whole()
        np.testing.assert_array_equal(worker.weights, true)
        assert worker.exchange.wire.coding_seconds > 0
        assert worker.exchange.wire.bytes_per_second > 0
        worker.exchange.leave()


@pytest.mark.parametrize(("name", "rounding"), [("float16", 2.0**-11), ("bfloat16", 2.0**-8)])
def test_sixteen_bits_stay_within_their_rounding_of_float32(serving, name: str, rounding: float) -> None:
    results = []
    for kind in ("float32", name):
        server = serving(kind, 2, decayed=DECAYED)
        workers = train([server], kind, 2, 10)
        results.append(workers[0].exchange.pull(state=False)["parameters"])
        held = workers[0].weights
        for worker in workers:
            worker.exchange.leave()
    # A mean of one worker's is at most 5 * 48/7 here, and no more than one rounding of each worker's is outstanding.
    largest = 5 * SAMPLES / 7
    np.testing.assert_allclose(results[1], results[0], rtol=0, atol=RATE * 2 * rounding * largest + 1e-5)
    # What workers hold is behind by the rounding of one step's way.
    np.testing.assert_allclose(held, results[1], rtol=0, atol=2 * rounding * RATE * 2 * largest)


def test_fewer_bytes_are_sent_both_ways(serving) -> None:
    sizes = {}
    for name in ("float32", "int8"):
        (worker,) = train([serving(name, 1)], name, 1, 4)
        sizes[name] = worker.exchange.sent_bytes, worker.exchange.received_bytes
        worker.exchange.leave()
    for plain, coded in zip(sizes["float32"], sizes["int8"], strict=True):
        assert plain > 3 * coded


def call(server: Serving, messages: list[bytes]) -> grpc.RpcError | None:
    """What a stream of these messages comes to."""
    metadata = (("authorization", f"Bearer {TOKEN}"),)
    with grpc.insecure_channel(server.address) as channel:
        join = channel.unary_unary(f"/{SERVICE}/Join", pb.JoinRequest.SerializeToString, pb.JoinResponse.FromString)
        join(
            pb.JoinRequest(
                worker=0, generation=3, parameter_count=COUNT, layout_digest=DIGEST, wire_format=server.wire_format
            ),
            metadata=metadata,
        )
        try:
            list(channel.stream_stream(f"/{SERVICE}/Exchange")(iter(messages), metadata=metadata, timeout=20))
        except grpc.RpcError as error:
            return error
    return None


def good(name: str, values: np.ndarray) -> bytearray:
    codec = make_codec(wire_format(name))
    out = np.empty(encoded_bytes(codec, len(values)), np.uint8)
    encode(codec, values.astype(np.float32), out)
    return bytearray(out.tobytes())


def with_indices(*indices: int) -> bytes:
    payload = good("top_k", np.arange(1, CHUNK + 1))
    kept = len(payload) // 6
    payload[4 * kept :] = np.array([*indices, *range(100, 100 + kept - len(indices))], np.uint16).tobytes()
    return bytes(payload)


def scaled(name: str, scale: float) -> bytes:
    payload = good(name, np.ones(CHUNK))
    payload[:4] = np.float32(scale).tobytes()
    return bytes(payload)


HOSTILE = {
    "truncated": ("int8", bytes(good("int8", np.ones(CHUNK))[:-1]), "303 bytes, 300 elements take 304 as int8"),
    "float32 in its place": ("int8", np.ones(CHUNK, np.float32).tobytes(), "1200 bytes, 300 elements take 304 as int8"),
    "far too large": ("sign", bytes(8 << 20), "8388608 bytes, 300 elements take 46 as sign"),
    "empty": ("float16", b"", "0 bytes, 300 elements take 600 as float16"),
    "a scale that is not a number": ("int8", scaled("int8", np.nan), "the gradient is not finite at element 0"),
    "a scale that is infinite": ("sign", scaled("sign", np.inf), "the gradient is not finite at element 0"),
    "a sum beyond float32": ("int8", scaled("int8", 1e37), "the gradient is not finite at element 0"),
    "not a number": ("bfloat16", bytes(good("bfloat16", np.full(CHUNK, np.nan))), "the gradient is not finite"),
    "an index out of range": ("top_k", with_indices(300), "index 300 lies outside a block of 300"),
    "an index repeated": ("top_k", with_indices(7, 7), "index 7 follows 7: they must rise"),
    "indices that fall": ("top_k", with_indices(8, 7), "index 7 follows 8: they must rise"),
}


@pytest.mark.parametrize(("name", "payload", "words"), HOSTILE.values(), ids=HOSTILE)
def test_a_payload_that_does_not_decode_is_refused_and_changes_nothing(serving, name, payload, words) -> None:
    server = serving(name)
    before = server.shard.parameters.tobytes(), server.shard.version
    head = pb.ExchangeRequest(
        worker=0, generation=3, step=1, samples=100, learning_rate=0.1, share_samples=1, gradient=payload
    )
    found = call(server, [head.SerializeToString()])
    assert found is not None
    assert found.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert words in found.details()
    assert "step 1, offset 0" in found.details()
    assert (server.shard.parameters.tobytes(), server.shard.version) == before
    np.testing.assert_array_equal(server.wire._of(0).weights, server.shard.parameters)


def test_a_worker_of_another_format_is_refused_by_name(serving) -> None:
    for taken, pushed in (("int8", "sign"), ("int8", "float32"), ("float32", "int8")):
        server = serving(taken)
        worker = Worker([server.address], pushed, 0, 1)
        with pytest.raises(TrainingFault, match=f"worker 0 pushes {pushed} and the parameter server takes {taken}"):
            worker.exchange.join()
        worker.exchange.close()


def test_a_pull_that_publishes_is_for_the_jobs_workers(serving) -> None:
    server = serving("int8")
    metadata = (("authorization", f"Bearer {TOKEN}"),)
    with grpc.insecure_channel(server.address) as channel:
        pull = channel.unary_stream(f"/{SERVICE}/Pull", pb.PullRequest.SerializeToString)
        for request, words in (
            (pb.PullRequest(publish=True, worker=7, generation=3), "worker 7 does not exist"),
            (pb.PullRequest(publish=True, worker=0, generation=2), "an earlier launch"),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                list(pull(request, metadata=metadata, timeout=20))
            assert words in str(refused.value.details())


@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
def test_a_shard_that_dies_comes_back_and_all_workers_hold_the_same_again(mode: str) -> None:
    job = rules.resolve(
        parse_job(
            "{data: {train: {built_in: digits}}, model: [{dense: {units: 10}}], loss: softmax_cross_entropy,"
            "optimizer: {sgd: {learning_rate: 0.25}},"
            f"sync: {{parameter_server: {{snapshot_steps: 2, wire_format: int8, mode: {mode}}}}}}}"
        )
    )
    shard = SupervisedServer(
        job, Checkpoint(0, 0, 0, DIGEST, [], first_weights(), {}), Part(0, COUNT), 2, 3, TOKEN, "127.0.0.1"
    )
    workers = [Worker([shard.address], "int8", number, 2, return_seconds=30) for number in range(2)]
    try:
        for worker in workers:
            assert worker.exchange.join() == 0
        with ThreadPoolExecutor(2) as pool:
            for step in range(1, 9):
                if step in (1, 4, 6):  # before the first step, and with steps lost and whole weights taken
                    os.kill(shard.pid, signal.SIGKILL)
                list(pool.map(lambda worker: worker.step(step), workers))  # noqa: B023
                if step == 5:
                    list(pool.map(lambda worker: worker.take_whole(), workers))
                if mode == "synchronous":
                    np.testing.assert_array_equal(workers[0].weights, workers[1].weights)
        assert [worker.exchange.restarts for worker in workers] == [3, 3]
        true = workers[0].exchange.pull(state=False)["parameters"]
        for worker in workers:
            if mode == "synchronous":  # else the other one's last push is not in them
                np.testing.assert_allclose(worker.weights, true, rtol=0, atol=0.1)
            worker.take_whole()
            np.testing.assert_array_equal(worker.weights, true)
    finally:
        for worker in workers:
            worker.exchange.close()
        shard.stop()
