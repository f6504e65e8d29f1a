"""The parameter server through real gRPC, with workers in threads: the same weights as the plain sum and update.

What strangers and hostile workers may try is in test_hostile_workers.py.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from protos import job_pb2
from protos import parameter_server_pb2 as pb
from worker.errors import TrainingFault
from worker.optimizers import make_optimizer
from worker.server.modes import MODES
from worker.server.pushes import ShardSetup
from worker.server.service import SERVICE, ParameterServer
from worker.server.shard import Shard
from worker.sync.parameter_server import ParameterServerExchange

TOKEN = "a token of this test"
DIGEST = "d1" * 32
COUNT = 1000
CHUNK = 300  # 1000 elements make four chunks, the last one short
DECAYED = ((0, 250), (350, 700))
RATE = 0.05
OPTIMIZERS = {
    "sgd": job_pb2.Optimizer(sgd=job_pb2.SgdOptimizer(learning_rate=RATE)),
    "momentum": job_pb2.Optimizer(
        momentum=job_pb2.MomentumOptimizer(learning_rate=RATE, momentum=0.9, nesterov=False)
    ),
    "adam": job_pb2.Optimizer(
        adam=job_pb2.AdamOptimizer(learning_rate=RATE, beta1=0.9, beta2=0.999, epsilon=1e-8)
    ),
    "adamw": job_pb2.Optimizer(
        adamw=job_pb2.AdamwOptimizer(learning_rate=RATE, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.1)
    ),
}  # fmt: skip


def first_weights() -> np.ndarray:
    return np.random.default_rng(1).standard_normal(COUNT).astype(np.float32)


def gradient_of(worker: int, step: int) -> np.ndarray:
    return np.random.default_rng((worker, step)).standard_normal(COUNT).astype(np.float32)


class Serving:
    """A parameter server on an event loop in a thread of its own."""

    def __init__(self, optimizer: str, workers: int, **setup: object) -> None:
        spec = make_optimizer(OPTIMIZERS[optimizer])
        settings = {"chunk_elements": CHUNK, "decayed": DECAYED, "generation": 3, **setup}
        self.setup = ShardSetup(COUNT, DIGEST, workers, **settings)
        here = slice(self.setup.start, self.setup.stop)
        weights = first_weights()[here].copy()
        self.shard = Shard(self.setup, spec, weights, spec.init(len(weights), np.float32))
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.server = self.run(self._make())
        self.address = f"127.0.0.1:{self.run(self.server.start('127.0.0.1:0'))}"

    async def _make(self) -> ParameterServer:
        return ParameterServer(self.shard, TOKEN)

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(10)

    def stop(self) -> None:
        self.run(self.server.stop(0.2))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()


@pytest.fixture
def serving() -> Iterator[Callable[..., Serving]]:
    with contextlib.ExitStack() as stack:

        def start(optimizer: str = "sgd", workers: int = 1, **setup: object) -> Serving:
            server = Serving(optimizer, workers, **setup)
            stack.callback(server.stop)
            return server

        yield start


def exchange_of(*servers: Serving, worker: int = 0, **changes: object) -> ParameterServerExchange:
    settings = {
        "worker": worker, "workers": servers[0].setup.workers, "generation": 3, "token": TOKEN,
        "layout_digest": DIGEST, "parameters": first_weights(), "gradient": np.zeros(COUNT, np.float32),
        "totals": np.zeros(2), "timeout_seconds": 20.0,
    }  # fmt: skip
    return ParameterServerExchange([server.address for server in servers], **(settings | changes))


def train(servers: list[Serving], worker: int, steps: int) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    weights, gradient, totals = first_weights(), np.zeros(COUNT, np.float32), np.zeros(2)
    exchange = exchange_of(*servers, worker=worker, parameters=weights, gradient=gradient, totals=totals)
    assert exchange.join() == 0
    for step in range(1, steps + 1):
        gradient[:] = gradient_of(worker, step)
        totals[:] = worker + 1, step
        exchange.step(step, samples=48, learning_rate=RATE / step)
    pulled = exchange.pull() if worker == 0 else {}
    assert exchange.sent_bytes > steps * COUNT * 4
    assert exchange.received_bytes > steps * COUNT * 4
    assert exchange.wait_seconds > 0
    exchange.leave()
    return weights, pulled, totals


def plain(optimizer: str, workers: int, steps: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    weights, chosen = first_weights(), make_optimizer(OPTIMIZERS[optimizer])
    state = chosen.init(COUNT, np.float32)
    for step in range(1, steps + 1):
        total = sum(gradient_of(worker, step).astype(np.float64) for worker in range(workers))
        chosen.update(weights, (total / 48).astype(np.float32), state, step, RATE / step, DECAYED)
    return weights, state


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_twenty_steps_give_the_weights_of_the_plain_sum_and_update(serving, optimizer: str, workers: int) -> None:
    server = serving(optimizer, workers)
    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(lambda worker: train([server], worker, 20), range(workers)))
    expected, state = plain(optimizer, workers, 20)
    for weights, _, totals in results:
        np.testing.assert_allclose(weights, expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(weights, results[0][0])
        np.testing.assert_array_equal(totals, [workers * (workers + 1) / 2, 20 * workers])
    pulled = results[0][1]
    assert set(pulled) == {"parameters", *(f"optimizer.{name}" for name in state)}
    np.testing.assert_array_equal(pulled["parameters"], results[0][0])
    for name, array in state.items():
        np.testing.assert_allclose(pulled[f"optimizer.{name}"], array, rtol=1e-5, atol=1e-6)


def test_two_shards_give_the_weights_of_one(serving) -> None:
    shards = [serving("adamw", 2, start=0, stop=420), serving("adamw", 2, start=420)]
    with ThreadPoolExecutor(2) as pool:
        (weights, pulled, totals), _ = pool.map(lambda worker: train(shards, worker, 5), range(2))
    np.testing.assert_allclose(weights, plain("adamw", 2, 5)[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(pulled["parameters"], weights)
    np.testing.assert_array_equal(totals, [3, 10])


def test_shards_that_leave_a_gap_are_refused(serving) -> None:
    shards = [serving(stop=400), serving(start=420)]
    exchange = exchange_of(*shards)
    with pytest.raises(TrainingFault, match="begins at element 420, 400 is next"):
        exchange.join()
    exchange.close()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"token": "another"}, "token is missing or wrong"),
        ({"layout_digest": "e2" * 32}, "layout e2e2e2e2e2e2.*d1d1d1d1d1d1"),
    ],
)
def test_who_does_not_belong_is_told_which_server_says_so(serving, change: dict[str, object], words: str) -> None:
    server = serving()
    exchange = exchange_of(server, **change)
    with pytest.raises(TrainingFault, match=f"parameter server {server.address}, join: .*{words}"):
        exchange.join()
    exchange.close()


def test_an_ordinary_protobuf_client_is_understood(serving) -> None:
    """The wire format is the schema's: a client that knows only the stubs gets the same weights."""
    server = serving(workers=1)
    metadata = (("authorization", f"Bearer {TOKEN}"),)
    gradient = gradient_of(0, 1)
    with grpc.insecure_channel(server.address) as channel:
        join = channel.unary_unary(
            f"/{SERVICE}/Join", pb.JoinRequest.SerializeToString, pb.JoinResponse.FromString
        )  # fmt: skip
        joined = join(
            pb.JoinRequest(worker=0, generation=3, parameter_count=COUNT, layout_digest=DIGEST), metadata=metadata
        )
        assert (joined.chunk_elements, joined.step, joined.start, joined.stop) == (CHUNK, 0, 0, COUNT)
        pushes = [
            pb.ExchangeRequest(
                worker=0, generation=3, step=1, offset=start, samples=4, learning_rate=0.1,
                gradient=gradient[start : start + CHUNK].tobytes(),
            )
            for start in range(0, COUNT, CHUNK)
        ]  # fmt: skip
        call = channel.stream_stream(
            f"/{SERVICE}/Exchange", pb.ExchangeRequest.SerializeToString, pb.ExchangeResponse.FromString
        )(iter(pushes), metadata=metadata, timeout=10)
        answers = [next(call) for _ in pushes]
        weights = np.concatenate([np.frombuffer(answer.weights, "<f4") for answer in answers])
    np.testing.assert_allclose(weights, first_weights() - 0.1 * gradient / 4, rtol=1e-6, atol=1e-6)


def test_a_worker_that_vanishes_mid_step_ends_the_others_by_name(serving) -> None:
    server = serving(workers=3)
    others = [exchange_of(server, worker=worker) for worker in (0, 1)]
    vanishing = exchange_of(server, worker=2)
    for exchange in (*others, vanishing):
        exchange.join()
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(exchange.step, 1, 48, RATE) for exchange in others]
        began = time.monotonic()
        vanishing.close()
        for future in waiting:
            with pytest.raises(TrainingFault, match=r"step 1: worker 2 of 3 is gone at step 1: its stream ended"):
                future.result(10)
        assert time.monotonic() - began < 5
    for exchange in others:
        exchange.close()


def test_a_silent_worker_ends_the_step_at_the_servers_deadline(serving) -> None:
    server = serving(workers=2, step_timeout_seconds=0.3)
    exchange, silent = exchange_of(server, worker=0), exchange_of(server, worker=1)
    exchange.join()
    silent.join()
    with pytest.raises(TrainingFault, match=r"step 1 waited 0\.\d s for the gradient of worker 1 of 2 \(worker 0"):
        exchange.step(1, 48, RATE)
    exchange.close()
    silent.close()


def test_a_server_that_does_not_answer_ends_the_step_at_the_workers_deadline(serving) -> None:
    server = serving(workers=2)
    exchange = exchange_of(server, worker=0, timeout_seconds=0.3)
    exchange.join()
    with pytest.raises(TrainingFault, match=r"step 1: no answer in time \(worker 0 of 2 waited 0\.\d s for 4 of 4"):
        exchange.step(1, 48, RATE)
    exchange.close()


def test_a_server_that_ends_is_named(serving) -> None:
    server = serving(workers=2)
    exchange = exchange_of(server, worker=0)
    exchange.join()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(exchange.step, 1, 48, RATE)
        server.run(server.server.stop(0.2))
        with pytest.raises(TrainingFault, match=f"parameter server {server.address}, step 1: "):
            waiting.result(10)
    exchange.close()


def test_a_refused_push_tells_its_worker_why_and_the_others_whose_it_was(serving) -> None:
    server = serving(workers=2)
    gradient = np.zeros(COUNT, np.float32)
    gradient[910] = np.nan
    wrong, right = exchange_of(server, worker=0, gradient=gradient), exchange_of(server, worker=1)
    wrong.join()
    right.join()
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(exchange.step, 1, 48, RATE) for exchange in (wrong, right)]
        reason = "worker 0 of 2, step 1, offset 900: the gradient is not finite at element 910"
        with pytest.raises(TrainingFault, match=rf"step 1: {reason}"):
            futures[0].result(10)
        with pytest.raises(TrainingFault, match=rf"worker 0 of 2 is gone at step 1: its push was refused: {reason}"):
            futures[1].result(10)
    np.testing.assert_array_equal(server.shard.parameters, first_weights())
    wrong.close()
    right.close()


def test_workers_that_left_are_no_fault(serving) -> None:
    server = serving(workers=2)
    exchanges = [exchange_of(server, worker=worker) for worker in range(2)]
    for exchange in exchanges:
        exchange.join()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda exchange: exchange.step(1, 48, RATE), exchanges))
    exchanges[0].leave()
    assert exchanges[1].pull(state=False).keys() == {"parameters"}
    with pytest.raises(TrainingFault, match="worker 0 of 2 left after step 1"):
        exchanges[1].step(2, 48, RATE)
    exchanges[1].close()


@pytest.mark.parametrize("lead_steps", [0, 2])
def test_a_worker_waits_only_while_it_is_too_far_ahead(serving, lead_steps: int) -> None:
    mode = MODES["bounded_staleness"]._replace(lead_steps=lead_steps)
    server = serving(workers=2, mode=mode)
    fast, slow = exchange_of(server, worker=0), exchange_of(server, worker=1)
    for exchange in (fast, slow):
        exchange.join()
    for step in range(1, lead_steps + 1):
        fast.step(step, 48, RATE)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(fast.step, lead_steps + 1, 48, RATE)
        slow.step(1, 48, RATE)
        waiting.result(10)
    slow.leave()  # nobody waits for one who left
    for step in (2, 3):
        fast.step(lead_steps + step, 48, RATE)
    fast.leave()


def test_an_asynchronous_worker_waits_for_nobody(serving) -> None:
    server = serving(workers=2, mode=MODES["asynchronous"])
    weights, gradient = first_weights(), gradient_of(0, 1)
    exchange = exchange_of(server, worker=0, parameters=weights, gradient=gradient)
    exchange.join()
    for step in (1, 2, 3):
        exchange.step(step, 48, RATE)
    np.testing.assert_allclose(weights, first_weights() - 3 * RATE / 48 * gradient, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(exchange.pull(state=False)["parameters"], weights)
    exchange.leave()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": 2}, "worker 1 of 2, step 2, offset 0: this worker is at step 1"),
        ({"offset": 1}, "offset 1: no chunk begins there"),
        ({"gradient": bytes(4 * CHUNK - 4)}, "299 elements, the chunk has 300"),
        ({"gradient": bytes(4 * CHUNK + 4)}, "301 elements, the chunk has 300"),
        ({"gradient": bytes(4 * CHUNK - 1)}, "worker 1, step 1, offset 0: 1199 bytes of float32"),
        ({"gradient": np.full(CHUNK, np.nan, "<f4").tobytes()}, "the gradient is not finite at element 0"),
        ({"share_samples": 49}, "a share of 49 samples in a batch of 48"),
        ({"generation": 2}, "an earlier launch"),
    ],
)
def test_a_hostile_push_is_refused_and_changes_nothing_where_it_would_be_applied_at_once(
    serving, change: dict[str, object], words: str
) -> None:
    server = serving(workers=2, mode=MODES["asynchronous"])
    server.shard.join(1, 3, COUNT, DIGEST)
    terms = {"samples": 48, "share_samples": 24, "learning_rate": RATE, "gradient": bytes(4 * CHUNK)}
    push = pb.ExchangeRequest(**({"worker": 1, "generation": 3, "step": 1, "offset": 0} | terms | change))
    with grpc.insecure_channel(server.address) as channel:
        call = channel.stream_stream(f"/{SERVICE}/Exchange", pb.ExchangeRequest.SerializeToString)(
            iter([push]), metadata=(("authorization", f"Bearer {TOKEN}"),), timeout=5
        )
        with pytest.raises(grpc.RpcError) as refusal:
            next(call)
    assert words in refusal.value.details()
    np.testing.assert_array_equal(server.shard.parameters, first_weights())
