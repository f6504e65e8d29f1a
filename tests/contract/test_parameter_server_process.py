"""The parameter server as a process: it says where it listens, and does not outlive whoever started it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format

from protos import environment, job_pb2
from worker.checked_file import write_checked
from worker.errors import CheckpointFault, TrainingFault
from worker.measurements import Position
from worker.server.process import ServerProcess, load_shard, start_server_process
from worker.sync.parameter_server import ParameterServerExchange

PUSH_AND_PULL = Path(__file__).parents[1] / "mpi" / "programs" / "push_and_pull.py"
TOKEN = "a token of this test"
DIGEST = "ab" * 32
COUNT = 64
EXITS = 4  # each takes the start of two processes
MOMENTUM = job_pb2.JobSpec(
    optimizer=job_pb2.Optimizer(
        momentum=job_pb2.MomentumOptimizer(learning_rate=0.1, momentum=0.5, nesterov=False)
    )
)  # fmt: skip
# What the command line does with the arguments of start_server_process, with a job in protobuf's text format.
PROGRAM = (
    sys.executable,
    "-c",
    """
import sys
from argparse import ArgumentParser
from pathlib import Path
from google.protobuf import text_format
from protos import environment, job_pb2
from worker.errors import Fault
from worker.server.process import serve_parameters
parser = ArgumentParser()
parser.add_argument("job", type=Path)
parser.add_argument("start", type=Path)
parser.add_argument("--workers", type=int)
parser.add_argument("--generation", type=int)
parser.add_argument("--listen")
given = parser.parse_args()
spec = text_format.Parse(given.job.read_text(), job_pb2.JobSpec())
try:
    serve_parameters(given.start, spec, given.workers, given.listen, given.generation)
except Fault as fault:
    sys.exit(f"error: {fault}")
assert "mpi4py" not in sys.modules
""",
)


def save_start(path: Path, tensors: dict[str, np.ndarray] | None = None, **metadata: str) -> Path:
    tensors = tensors or {"parameters": np.arange(COUNT, dtype=np.float32)}
    position = {name: json.dumps(value) for name, value in asdict(Position()).items()}
    write_checked(path, tensors, {"layout_digest": DIGEST, "decayed": "[[0, 8]]"} | position | metadata)
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    job = tmp_path / "job.txtpb"
    job.write_text(text_format.MessageToString(MOMENTUM))
    return job, save_start(tmp_path / "start.safetensors")


def start(files: tuple[Path, Path], **changes: object) -> ServerProcess:
    settings = {"workers": 1, "generation": 5, "token": TOKEN, "program": PROGRAM} | changes
    return start_server_process(*files, **settings)


def exchange_of(server: ServerProcess, weights: np.ndarray, gradient: np.ndarray) -> ParameterServerExchange:
    return ParameterServerExchange([server.address], 0, 1, 5, TOKEN, DIGEST, weights, gradient, np.zeros(1))


def test_a_rank_starts_a_server_trains_and_stops_it(files) -> None:
    server = start(files)
    weights, gradient = np.arange(COUNT, dtype=np.float32), np.ones(COUNT, np.float32)
    exchange = exchange_of(server, weights, gradient)
    assert exchange.join() == 0
    exchange.step(1, 2, 0.1)
    np.testing.assert_allclose(weights, np.arange(COUNT) - 0.05, rtol=1e-6)
    exchange.leave()
    assert server.stop() == 0


@pytest.mark.parametrize("end", ["leave", "close"])
def test_a_closed_exchange_leaves_no_thread_that_could_hold_up_the_exit(files, end: str) -> None:
    before = set(threading.enumerate())
    server = start(files)
    zeros = np.zeros(COUNT, np.float32)
    exchange = exchange_of(server, zeros, zeros.copy())
    exchange.join()
    exchange.step(1, 2, 0.1)
    exchange.pull()
    assert set(threading.enumerate()) > before
    getattr(exchange, end)()
    assert set(threading.enumerate()) == before
    server.stop()


def test_a_worker_that_left_ends_every_time(files, tmp_path: Path) -> None:
    start_file = save_start(tmp_path / "zeros.safetensors", layout_digest="0" * 64)
    settings = os.environ | {environment.JOB_TOKEN: TOKEN, "PYTHONPATH": str(PUSH_AND_PULL.parents[3])}
    for _ in range(EXITS):
        server = start((files[0], start_file), generation=1)
        argv = [sys.executable, str(PUSH_AND_PULL), server.address, "0", "1", str(COUNT), "3"]
        done = subprocess.run(argv, env=settings, capture_output=True, text=True, timeout=90, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert server.stop() == 0


def test_training_goes_on_from_the_state_that_was_pulled(files, tmp_path: Path) -> None:
    def steps(exchange: ParameterServerExchange, gradient: np.ndarray, numbers: range) -> None:
        for step in numbers:
            gradient[:] = step
            exchange.step(step, 1, 0.1)

    weights, gradient = np.arange(COUNT, dtype=np.float32), np.zeros(COUNT, np.float32)
    server = start(files)
    exchange = exchange_of(server, weights, gradient)
    exchange.join()
    steps(exchange, gradient, range(1, 4))
    saved = exchange.pull()
    steps(exchange, gradient, range(4, 7))
    exchange.leave()
    server.stop()

    again = start((files[0], save_start(tmp_path / "later.safetensors", saved, step="3")))
    resumed = saved["parameters"].copy()
    exchange = exchange_of(again, resumed, gradient)
    assert exchange.join() == 3
    steps(exchange, gradient, range(4, 7))
    exchange.leave()
    again.stop()
    np.testing.assert_array_equal(resumed, weights)


def test_the_end_of_standard_input_ends_it(files) -> None:
    server = start(files)
    server.process.stdin.close()
    assert server.process.wait(10) == 0
    server.process.stdout.close()


def test_sigterm_ends_it(files) -> None:
    server = start(files)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(10) == 0
    server.stop()


def test_killing_whoever_started_it_ends_it(files) -> None:
    parent = subprocess.Popen(
        [
            sys.executable, "-c",
            "import sys, time; from pathlib import Path; from worker.server.process import start_server_process\n"
            "server = start_server_process(Path(sys.argv[1]), Path(sys.argv[2]), 1, 5, 'token', program=sys.argv[3:])\n"
            "print(server.process.pid, flush=True); time.sleep(100)",
            *map(str, files), *PROGRAM,
        ],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert parent.stdout is not None
    server = int(parent.stdout.readline())
    os.kill(server, 0)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    # The orphan's exit is nobody's to wait for here: look until it is gone, or a zombie of whoever adopted it.
    deadline = time.monotonic() + 10
    while _runs(server):
        assert time.monotonic() < deadline, "the server outlives its parent"
        time.sleep(0.02)


def test_a_worker_killed_mid_step_ends_the_others_at_once(files) -> None:
    server = start(files, workers=2)
    other = subprocess.Popen(
        [
            sys.executable, "-c",
            "import sys, time, numpy as np; from worker.sync.parameter_server import ParameterServerExchange\n"
            "zeros = np.zeros(64, np.float32)\n"
            "ParameterServerExchange(sys.argv[1:2], 1, 2, 5, sys.argv[2], sys.argv[3], zeros, zeros, zeros).join()\n"
            "print(flush=True); time.sleep(100)",
            server.address, TOKEN, DIGEST,
        ],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert other.stdout is not None
    assert other.stdout.readline() == b"\n"
    zeros = np.zeros(COUNT, np.float32)
    exchange = ParameterServerExchange([server.address], 0, 2, 5, TOKEN, DIGEST, zeros, zeros.copy(), np.zeros(1))
    exchange.join()
    killer = threading.Timer(0.1, other.kill)
    killer.start()
    with pytest.raises(TrainingFault, match=r"step 1: worker 1 of 2 is gone at step 1: .*worker 0 of 2 waited [0-4]\."):
        exchange.step(1, 2, 0.1)
    killer.join()
    other.wait()
    other.stdout.close()
    exchange.close()
    server.stop()


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_server_sees_nothing_of_mpi(files, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PRTE_LAUNCHED"):
        monkeypatch.setenv(name, "1")
    server = start(files)
    variables = Path(f"/proc/{server.process.pid}/environ").read_bytes().split(b"\0")
    assert not [entry for entry in variables if entry.startswith((b"OMPI_", b"PMIX_", b"PRTE_"))]
    assert server.stop() == 0


def test_a_port_in_use_is_named(files, capfd: pytest.CaptureFixture[str]) -> None:
    first = start(files)
    with pytest.raises(TrainingFault, match="it ended with exit code 1 before it listened; its own message is above"):
        start(files, listen=first.address)
    assert f"error: parameter server: cannot listen on {first.address}" in capfd.readouterr().err
    assert first.stop() == 0


def test_a_server_without_a_token_refuses_to_start(files, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TrainingFault, match="exit code 1"):
        start(files, token="")
    assert "PACELINE_JOB_TOKEN is not set" in capfd.readouterr().err


def test_a_program_that_says_nothing_is_given_up(files) -> None:
    began = time.monotonic()
    with pytest.raises(TrainingFault, match=r"did not listen within 0\.3 s"):
        start(files, program=(sys.executable, "-c", "import time; time.sleep(60)"), timeout_seconds=0.3)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ({"weights": np.zeros(3, np.float32)}, {}, "parameters is missing: this is not a checkpoint"),
        ({"parameters": np.zeros((3, 1), np.float32)}, {}, r"parameters is float32 \(3, 1\), needs float32 \(n,\)"),
        ({"parameters": np.zeros(3)}, {}, r"parameters is float64 \(3,\), needs float32"),
        ({"parameters": np.zeros(3, np.float32)}, {"step": "4"}, "optimizer.velocity is missing after step 4"),
        ({"parameters": np.zeros(3, np.float32)}, {"step": "four"}, "its metadata is damaged"),
        ({"parameters": np.zeros(3, np.float32)}, {"decayed": "[1]"}, "its metadata is damaged"),
        (
            {"parameters": np.zeros(3, np.float32), "optimizer.velocity": np.zeros(2, np.float32)},
            {},
            r"optimizer.velocity is float32 \(2,\), needs float32 \(3,\)",
        ),
    ],
)
def test_a_start_file_that_does_not_fit_is_named(
    tmp_path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str], words: str
) -> None:
    path = save_start(tmp_path / "start.safetensors", tensors, **metadata)
    with pytest.raises(CheckpointFault, match=f"start.safetensors: {words}"):
        load_shard(path, MOMENTUM, 1, 1)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", json.dumps({}).encode()])
def test_a_start_file_that_is_no_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "start.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointFault, match=r"start\.safetensors: is damaged"):
        load_shard(path, MOMENTUM, 1, 1)


def test_a_start_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointFault, match="is not there"):
        load_shard(tmp_path / "start.safetensors", MOMENTUM, 1, 1)
