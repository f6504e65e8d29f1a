"""A shard's answers in a lossy wire format: what workers make of them is what the shard has published, to the bit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos import job_pb2, rules
from protos import parameter_server_pb2 as pb
from worker.compression import FORMATS, make_codec
from worker.compression.codec import encode, encoded_bytes
from worker.optimizers import Optimizer, make_optimizer
from worker.server.modes import MODES
from worker.server.published import EVERYONE, ShardWire, check_format, open_wire
from worker.server.pushes import Answer, Conflict, Push, Refused, ShardSetup
from worker.server.shard import Shard
from worker.sync.server_wire import ChunkPush, Lossy, LossyWire

COUNT, CHUNK, START, WORKERS = 40, 16, 16, 3
OFFSETS = (16, 32, 48)
LOSSY = [name for name in FORMATS if name != "float32"]
SGD = job_pb2.Optimizer(sgd=job_pb2.SgdOptimizer(learning_rate=0.5))


def wire_format(name: str, fraction: float = 0.25) -> job_pb2.WireFormat:
    made = job_pb2.WireFormat()
    getattr(made, name).SetInParent()
    if name == "top_k":
        made.top_k.fraction = fraction
    return made


def sgd() -> Optimizer:
    return make_optimizer(SGD)


def first_weights() -> np.ndarray:
    return np.linspace(-1, 1, START + COUNT, dtype=np.float32)


class Line:
    """A shard that holds the elements from START on, its wire, and workers that hold what they were sent."""

    def __init__(self, name: str, mode: str = "synchronous", restored: bool = False, step: int = 0) -> None:
        setup = ShardSetup(
            START + COUNT, "digest", WORKERS, start=START, chunk_elements=CHUNK, mode=MODES[mode], restored=restored
        )
        weights = first_weights()[START:].copy()
        self.shard = Shard(setup, sgd(), weights, {}, step)
        self.wire = ShardWire(self.shard, wire_format(name))
        self.held = [first_weights() for _ in range(WORKERS)]
        self.gradients = [np.zeros(START + COUNT, np.float32) for _ in range(WORKERS)]
        self.residuals = [np.zeros(START + COUNT, np.float32) for _ in range(WORKERS)]
        self.workers = [
            LossyWire(Lossy(wire_format(name), residual), gradient, held)
            for residual, gradient, held in zip(self.residuals, self.gradients, self.held, strict=True)
        ]
        self.whole = 0  # answers that were

    def join(self, worker: int, step: int = 0) -> None:
        self.shard.join(worker, 1, START + COUNT, "digest", step)
        self.wire.join(worker)

    def push(self, worker: int, step: int, offset: int) -> None:
        stop = min(offset + CHUNK, START + COUNT)
        payload = self.workers[worker].outgoing(ChunkPush(step, offset, stop, WORKERS, 0.5, 1))
        head = pb.ExchangeRequest(worker=worker, step=step, offset=offset, samples=WORKERS)
        gradient = self.wire.gradient(head, memoryview(payload.tobytes()))
        for answer in self.shard.receive(Push(worker, 1, step, offset, WORKERS, 0.5, gradient, share=1), 0.0):
            self.deliver(answer)

    def deliver(self, answer: Answer) -> None:
        reply = pb.ExchangeResponse(step=answer.step, offset=answer.offset)
        payload = memoryview(self.wire.answer(answer, reply).tobytes())
        self.whole += not reply.encoded
        for worker in answer.workers:
            stop = min(answer.offset + CHUNK, START + COUNT)
            assert self.workers[worker].take(reply, payload, stop)

    def step(self, step: int, seed: int) -> None:
        for worker in range(WORKERS):
            self.gradients[worker][:] = np.random.default_rng((seed, step, worker)).standard_normal(START + COUNT)
        for offset in OFFSETS:
            for worker in range(WORKERS):
                self.push(worker, step, offset)

    def published(self, worker: int) -> np.ndarray:
        held = self.wire._published
        return held[EVERYONE if EVERYONE in held else worker].weights


def running(name: str, mode: str = "synchronous") -> Line:
    line = Line(name, mode)
    for worker in range(WORKERS):
        line.join(worker)
    return line


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOSSY)
def test_workers_hold_what_is_published_and_the_weights_are_what_was_pushed(name: str, mode: str) -> None:
    line, sent = running(name, mode), np.zeros(START + COUNT)
    for step in range(1, 9):
        line.step(step, 7)
        sent += sum(gradient.astype(np.float64) for gradient in line.gradients)
        for worker in range(WORKERS):
            np.testing.assert_array_equal(line.held[worker][START:], line.published(worker))
    # Nothing is lost but deferred: the weights moved by all that was to be sent, but what is in the residuals.
    unsent = sum(residual.astype(np.float64) for residual in line.residuals)
    expected = first_weights() - 0.5 * (sent / WORKERS - unsent)
    np.testing.assert_allclose(line.shard.parameters, expected[START:], rtol=0, atol=1e-5)
    assert line.whole == (0 if mode == "synchronous" else len(OFFSETS) * WORKERS)  # a first answer to each


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(LOSSY), st.integers(0, 1000), st.lists(st.sampled_from(["step", "publish"]), max_size=8))
def test_whoever_takes_whole_weights_goes_on_from_them(name: str, seed: int, events: list[str]) -> None:
    line, step = running(name), 0
    for event in events:
        if event == "step":
            step += 1
            line.step(step, seed)
        else:
            for worker in range(WORKERS):
                line.wire.publish(worker, line.shard.parameters)
                line.held[worker][START:] = line.shard.parameters
        for worker in range(WORKERS):
            np.testing.assert_array_equal(line.held[worker][START:], line.published(worker))
    assert line.whole == 0


def test_a_shard_back_from_its_snapshot_answers_with_whole_weights_until_it_knows_what_is_held() -> None:
    line = Line("int8", restored=True, step=3)
    for worker, step in ((0, 5), (1, 5), (2, 4)):  # the last one had no answer to step 5
        line.join(worker, step)
    line.wire.publish(1, line.shard.parameters)  # which tells nothing of what the others hold
    line.held[1][START:] = line.shard.parameters
    for offset in OFFSETS:
        line.push(2, 5, offset)
    assert line.whole == len(OFFSETS)
    np.testing.assert_array_equal(line.held[2][START:], line.shard.parameters)
    line.held[0][:] = 5  # of steps that the snapshot has not seen
    line.step(6, 1)
    assert line.whole == 2 * len(OFFSETS)
    line.step(7, 1)
    assert line.whole == 2 * len(OFFSETS)
    for held in line.held:
        np.testing.assert_array_equal(held[START:], line.published(0))


@pytest.mark.parametrize("who", [[0], [0, 1], [0, 1, 2]])
def test_whole_weights_that_some_have_taken_are_sent_to_all_unless_all_have(who: list[int]) -> None:
    line = running("int8")
    line.step(1, 3)
    for worker in who:
        line.wire.publish(worker, line.shard.parameters)
        line.held[worker][START:] = line.shard.parameters
    line.step(2, 3)
    assert line.whole == (0 if len(who) == WORKERS else len(OFFSETS))
    for held in line.held:
        np.testing.assert_array_equal(held[START:], line.published(0))


def test_a_repeated_push_is_answered_with_what_the_others_hold() -> None:
    line = running("sign")
    line.step(1, 3)
    line.held[1][:] = 9
    line.push(1, 1, OFFSETS[0])
    here = slice(OFFSETS[0], OFFSETS[0] + CHUNK)
    np.testing.assert_array_equal(line.held[1][here], line.held[0][here])
    assert line.whole == 1


@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
def test_who_joins_a_running_job_is_sent_whole_weights_first(mode: str) -> None:
    line = running("int8", mode)
    line.step(1, 3)
    line.step(2, 3)
    before = line.whole
    line.held[1][:] = 9
    line.join(1)
    line.step(3, 3)
    np.testing.assert_array_equal(line.held[1][START:], line.published(1))
    assert line.whole == before + len(OFFSETS)


def test_a_chunk_of_a_step_is_encoded_once_and_a_worker_without_samples_keeps_its_residual() -> None:
    residual, gradient = np.zeros(COUNT, np.float32), np.linspace(0.1, 1, COUNT, dtype=np.float32)
    wire = LossyWire(Lossy(wire_format("sign"), residual), gradient, np.zeros(COUNT, np.float32))
    push = ChunkPush(1, 0, COUNT, 4, 0.1, 2)
    first, left = wire.outgoing(push).tobytes(), residual.copy()
    assert left.any()
    assert wire.outgoing(push).tobytes() == first
    np.testing.assert_array_equal(residual, left)
    codec, nothing = make_codec(wire_format("sign")), np.empty(len(first), np.uint8)
    encode(codec, np.zeros(COUNT, np.float32), nothing)
    assert wire.outgoing(push._replace(step=2, share=0)).tobytes() == nothing.tobytes()
    np.testing.assert_array_equal(residual, left)


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("change", [-1, 1, -COUNT])
def test_a_push_of_another_length_is_refused_before_anything_is_made_of_it(name: str, change: int) -> None:
    line = running(name)
    needed = encoded_bytes(make_codec(wire_format(name)), CHUNK)
    payload = bytes(max(0, needed + change))
    head = pb.ExchangeRequest(worker=1, step=1, offset=OFFSETS[0], samples=WORKERS)
    words = f"worker 1, step 1, offset 16: {len(payload)} bytes, {CHUNK} elements take {needed} as {name}"
    with pytest.raises(Refused, match=words):
        line.wire.gradient(head, memoryview(payload))


def test_workers_and_shard_must_have_the_same_format_with_the_same_options() -> None:
    wire = ShardWire(running("int8").shard, wire_format("top_k", 0.25))
    check_format(0, wire_format("top_k", 0.25), wire)
    check_format(0, job_pb2.WireFormat(), None)
    check_format(0, wire_format("float32"), None)
    for given_format, taken, words in (
        (wire_format("top_k", 0.5), wire, r"pushes top_k \{ fraction: 0.5 \} and the parameter server takes top_k"),
        (job_pb2.WireFormat(), wire, "pushes float32 and the parameter server takes top_k"),
        (wire_format("int8"), None, "pushes int8 and the parameter server takes float32"),
    ):
        with pytest.raises(Conflict, match=words):
            check_format(0, given_format, taken)


def test_float32_has_no_wire() -> None:
    job = rules.resolve(job_pb2.JobSpec(sync=job_pb2.Sync(parameter_server=job_pb2.ParameterServerSync())))
    assert open_wire(running("int8").shard, job.sync.parameter_server.wire_format) is None
