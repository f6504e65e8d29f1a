"""`paceline-worker join` and `follow` against real parameter servers; the founding worker is the test's own."""

import itertools
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from protos import environment, job_pb2, rules
from protos import parameter_server_pb2 as pb
from protos.job_file import parse_job
from worker.checkpoint import Checkpoint
from worker.data.sharding import batch_bounds, steps_per_epoch
from worker.preparation import prepare
from worker.server.process import Part
from worker.server.supervision import SupervisedServer
from worker.sync.exchange import TOTALS
from worker.sync.guest import GuestExchange, Leaving
from worker.sync.parameter_server import ParameterServerExchange
from worker.sync.server_connection import SERVICE, Server
from worker.wire import as_array, decode, encode

TOKEN, CUT, BATCH, DEADLINE_SECONDS = "a token of this test", 320, 64, 60
PROJECT = Path(__file__).parents[2]


def job(guests: bool = True, stall_seconds: float = 8, mode: str = "synchronous") -> job_pb2.JobSpec:
    return rules.resolve(
        parse_job(
            "{data: {train: {built_in: digits}, validation_fraction: 0.2}, model: [{dense: {units: 10}}],"
            "loss: softmax_cross_entropy, optimizer: {sgd: {learning_rate: 0.01}},"
            f"training: {{epochs: 10000, batch_size: {BATCH}}}, limits: {{stall_seconds: {stall_seconds}}},"
            f"sync: {{parameter_server: {{servers: 2, guests: {str(guests).lower()}, mode: {mode}}}}}}}"
        )
    )


class Founder:
    """Two shards, and the one founding worker, which does steps of no gradient until it is told to stop."""

    def __init__(self, spec: job_pb2.JobSpec) -> None:
        prepared = prepare(spec)
        model, self.samples = prepared.model, len(prepared.train)
        count = model.parameter_count
        self.shards = [
            SupervisedServer(
                spec, Checkpoint(0, 0, 0, model.layout_digest, [], np.zeros(stop - start, np.float32), {}),
                *(Part(start, count), 1, 1, TOKEN, "127.0.0.1"),
            )
            for start, stop in ((0, CUT), (CUT, count))
        ]  # fmt: skip
        self.weights, self.gradient = np.zeros(count, np.float32), np.zeros(count, np.float32)
        self.totals = np.zeros(len(TOTALS))
        self.worker = ParameterServerExchange(
            [shard.address for shard in self.shards], 0, 1, 1, TOKEN, model.layout_digest, self.weights, self.gradient,
            self.totals, timeout_seconds=DEADLINE_SECONDS, return_seconds=20, ranks=1,
        )  # fmt: skip
        self.worker.join()
        self.steps = 0
        self.most_guests = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._go_on)
        self._thread.start()

    @property
    def address(self) -> str:
        return self.shards[0].address

    def _go_on(self) -> None:
        while not self._stopping.wait(0.002):
            self.totals[:] = 0
            batch = self.steps % steps_per_epoch(self.samples, BATCH)
            first, stop = batch_bounds(batch, self.samples, BATCH)
            self.worker.step(self.steps + 1, stop - first, 0.01)
            self.steps += 1
            self.most_guests = max(self.most_guests, len(self.worker.guests))

    def stop(self) -> None:
        """As at the end of a job."""
        self._stopping.set()
        self._thread.join(DEADLINE_SECONDS)
        if self.worker.sent_bytes:
            self.worker.leave()
            self.worker.sent_bytes = 0
            for shard in self.shards:
                shard.stop()


class Program:
    """`paceline-worker` with its output in a file."""

    def __init__(self, log: Path, *arguments: str, token: str = TOKEN) -> None:
        self.log = log
        env = os.environ | {"PYTHONPATH": str(PROJECT), environment.JOB_TOKEN: token}
        with log.open("w") as file:
            command = [sys.executable, "-m", "worker", *arguments]
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env)

    def wait_for(self, pattern: str) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not re.search(pattern, self.log.read_text(), re.DOTALL):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.log.read_text()}"
            assert self.process.poll() is None, f"ended without {pattern!r}: {self.log.read_text()}"
            time.sleep(0.02)

    def end(self) -> tuple[int, str]:
        return self.process.wait(DEADLINE_SECONDS), self.log.read_text()


@pytest.fixture
def found() -> Iterator[Callable[..., Founder]]:
    founders: list[Founder] = []

    def make(**settings: object) -> Founder:
        founders.append(Founder(job(**settings)))
        return founders[-1]

    yield make
    for founder in founders:
        founder.stop()


@pytest.fixture
def program(tmp_path) -> Iterator[Callable[..., Program]]:
    programs: list[Program] = []

    def start(*arguments: str, **settings: str) -> Program:
        programs.append(Program(tmp_path / f"{len(programs)}.log", *arguments, **settings))
        return programs[-1]

    yield start
    for started in programs:
        if started.process.poll() is None:
            started.process.kill()
        started.process.wait(20)


@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
def test_a_guest_that_was_stopped_is_dropped_joins_again_by_itself_and_ends_with_the_job(
    found, program, capfd, mode
) -> None:
    founder = found(mode=mode)
    guest = program("join", founder.address)
    guest.wait_for(r"joined as guest 1\b.*taking part")
    guest.process.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + DEADLINE_SECONDS
    said = ""
    while "guest 1 was dropped in step" not in said:
        said += capfd.readouterr().err
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert re.search(r"guest 1 was dropped in step \d+: it was silent for \d+\.\d s", said)
    guest.process.send_signal(signal.SIGCONT)
    guest.wait_for(r"apart from the job: .*guest 1 was dropped in step \d+: it was silent.*joining again")
    guest.wait_for(r"joined as guest 2\b.*taking part")
    founder.stop()
    code, text = guest.end()
    assert (code, text.count("the job is over")) == (0, 1), text
    assert founder.most_guests == 1


def test_a_guest_joins_again_when_a_server_has_died_and_the_founding_worker_goes_on(found, program) -> None:
    founder = found()
    guest = program("join", founder.address)
    guest.wait_for("joined as guest 1.*taking part")
    os.kill(founder.shards[0].pid, signal.SIGKILL)
    guest.wait_for("taking part.*joining again.*taking part")
    assert founder.worker.restarts == 1
    guest.process.send_signal(signal.SIGTERM)
    code, text = guest.end()
    assert code == 0, text
    assert int(re.search(r"(\d+) steps done here", text)[1]) >= 2


def test_a_guest_that_cannot_come_is_told_why_with_the_code_of_the_reason(found, program, tmp_path) -> None:
    founder, closed = found(), found(guests=False)
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = [
        (("join", founder.address), "another", 4, "the job's token is missing or wrong"),
        (("follow", founder.address), "another", 4, "the job's token is missing or wrong"),
        (("join", "127.0.0.1:9"), TOKEN, 3, "127.0.0.1:9: no job that takes guests answers there"),
        (("join", closed.address), TOKEN, 1, "the job takes no guests: give its file"),
        (("follow", closed.address), TOKEN, 1, "the job takes no guests: give its file"),
        (("join", founder.address), "", 2, "the job's token is missing: name its file with --token-file, or set "),
        (("join", founder.address), "two\nlines", 2, "PACELINE_JOB_TOKEN: holds no token: one line of ASCII, as "),
        (
            ("follow", founder.address),
            "schl\xfcssel",
            2,
            "PACELINE_JOB_TOKEN: holds no token: one line of ASCII, as ",
        ),
        (("join", "here"), TOKEN, 2, "here: is neither HOST:PORT nor the output folder of a running job"),
        (("join", str(empty)), TOKEN, 2, f"{empty}: no job that takes guests runs there (No such file or directory)"),
    ]
    for arguments, token, expected, words in cases:
        code, text = program(*arguments, token=token).end()
        assert (code, len(re.findall("^error: ", text, re.MULTILINE)), words in text) == (expected, 1, True), text


def test_a_follower_that_reads_slowly_skips_versions_and_each_it_gets_is_whole(found) -> None:
    founder = found()
    founder.gradient[:] = 1  # every step moves all weights alike
    server = Server(founder.address, TOKEN)
    asked: queue.SimpleQueue[pb.BroadcastRequest | None] = queue.SimpleQueue()
    answers = server.channel.stream_stream(f"/{SERVICE}/Broadcast", pb.BroadcastRequest.SerializeToString, bytes)(
        iter(asked.get, None), metadata=server.metadata, timeout=DEADLINE_SECONDS
    )

    def next_version() -> int:
        asked.put(pb.BroadcastRequest(every_steps=3))
        head, payload = decode(pb.BroadcastResponse, pb.BroadcastResponse.WEIGHTS_FIELD_NUMBER, next(answers))
        weights = as_array(payload)
        assert (head.offset, head.start, head.stop, len(weights)) == (0, 0, CUT, CUT)
        np.testing.assert_array_equal(weights, np.full(CUT, weights[0]))
        return head.step

    steps = []
    for _ in range(4):
        steps.append(next_version())
        enough = founder.steps + 20
        while founder.steps < enough:
            time.sleep(0.01)
        assert steps[-1] <= founder.steps
    assert all(later >= step + 18 for step, later in itertools.pairwise(steps))
    assert all(step % 3 == 0 for step in steps[1:])
    founder.stop()
    assert next_version() == founder.steps  # it was sent before it was asked for, and the server is gone
    with pytest.raises(StopIteration):
        next(answers)
    asked.put(None)
    server.close()


def test_a_follower_evaluates_the_weights_as_json(found, program) -> None:
    founder = found()
    follower = program("follow", founder.address, "--format", "json")
    follower.wait_for(r'"step": \d+.*"step": \d+')
    founder.stop()
    code, text = follower.end()
    assert code == 0, text
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert lines[-1]["to_step"] == founder.steps
    for line in lines:
        assert line["validation_loss"] == pytest.approx(np.log(10), rel=1e-6)  # all weights are 0


def test_a_guest_that_listens_has_the_weights_of_the_whole_step_that_first_names_it() -> None:
    weights = np.zeros(6, np.float32)
    told = pb.DescribeResponse(addresses=["127.0.0.1:9", "127.0.0.1:9"], ranks=1)
    guest = GuestExchange(told, TOKEN, "digest", False, weights, weights.copy(), np.zeros(1))
    guest._worker = 3
    heard = (
        [(4, 0), (5, 2), (0, 0), (5, 0), (6, 2), (0, 0), (0, 0), (6, 0), (7, 2)],  # in the middle of step 4
        [(4, 4), (0, 0), (5, 4), (6, 4)],
    )
    for server, (start, stop), steps in zip(guest._servers, ((0, 4), (4, 6)), heard, strict=True):
        server.range, server.chunks = range(start, stop), {first: first + 2 for first in range(start, stop, 2)}
        server.stream = iter([
            encode(pb.ExchangeResponse(step=step, offset=offset, guests=[3] if (step, offset) == (6, 0) else []),
                   pb.ExchangeResponse.WEIGHTS_FIELD_NUMBER, np.full(2 if step else 0, step, np.float32))
            for step, offset in steps
        ])  # fmt: skip
    assert guest.listen(Leaving()) == 6
    np.testing.assert_array_equal(weights, np.full(6, 6))
    for server in guest._servers:
        server.channel.close()
