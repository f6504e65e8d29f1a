"""How the benchmark makes one run: the job file it gives us, the command's deadline, what a peer's stopwatch counts."""

import json
import sys
from pathlib import Path

import pytest

from protos.job_file import parse_job
from tests.benchmarks.cases import CASES, Case
from tests.benchmarks.contenders import CONTENDERS, PEERS, Run, job, peer
from tests.benchmarks.data_set import DataFiles
from tests.benchmarks.measurement import BenchmarkFailed, Command, run_command
from tests.benchmarks.peers.stopwatch import Stopwatch, peak_memory_bytes, seconds_since_process_start

MEGABYTE = 1_000_000


def make_run(folder: Path, case: Case = CASES[0], python: str = sys.executable) -> Run:
    return Run(case, 3, DataFiles(folder / "features.npy", folder / "labels.npy"), folder, Path(python))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("ranks", "sync"), [(1, "all_reduce"), (2, "all_reduce"), (2, "parameter_server")])
def test_our_job_file_is_valid_and_of_the_network_that_is_timed(
    case: Case, ranks: int, sync: str, tmp_path: Path
) -> None:
    spec = parse_job(json.dumps(job(make_run(tmp_path, case), ranks, sync)))
    assert [layer.dense.units for layer in spec.model if layer.HasField("dense")] == list(case.units[1:])
    assert [layer.WhichOneof("kind") for layer in spec.model] == (["dense", "relu"] * len(case.units))[
        : len(spec.model)
    ]
    assert spec.model[-1].HasField("dense")
    assert spec.training.batch_size == ranks * case.batch_size
    assert spec.sync.WhichOneof("kind") == sync
    assert spec.workers == ranks


def test_every_peer_is_a_script_that_is_there() -> None:
    names = {path.name for path in PEERS.glob("*.py")}
    assert {"pytorch_eager.py", "pytorch_ddp.py"} <= names
    assert [contender.ranks for contender in CONTENDERS if not contender.ours] == [1, 2]


def test_a_failed_command_says_what_it_said(tmp_path: Path) -> None:
    argv = (sys.executable, "-c", "import sys; print('so far'); sys.exit('no such device')")
    with pytest.raises(BenchmarkFailed, match=r"(?s)exited with 1: .*so far.*no such device"):
        run_command(Command(argv, {}), tmp_path)


def test_a_command_that_hangs_is_ended_at_its_deadline(tmp_path: Path) -> None:
    argv = (sys.executable, "-c", "import time; time.sleep(60)")
    with pytest.raises(BenchmarkFailed, match=r"still running after 0\.2 s"):
        run_command(Command(argv, {}), tmp_path, deadline_seconds=0.2)


def test_every_process_gets_one_thread(tmp_path: Path) -> None:
    argv = (sys.executable, "-c", "import os; print(os.environ['OPENBLAS_NUM_THREADS'], os.environ['OMP_NUM_THREADS'])")
    assert run_command(Command(argv, {}), tmp_path) == "1 1\n"


def test_a_peer_that_is_silent_or_babbles_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkFailed, match="printed no result"):
        peer("pytorch_eager.py")(make_run(tmp_path, python="/bin/true"))
    with pytest.raises(BenchmarkFailed, match="not a result"):
        peer("pytorch_eager.py")(make_run(tmp_path, python="/bin/echo"))


def test_a_peers_first_epoch_starts_the_clock_and_is_not_counted() -> None:
    seconds = iter([100.0, 102.0, 104.0])
    stopwatch = Stopwatch(clock=lambda: next(seconds))
    stopwatch.step_done()
    first = stopwatch.seconds_to_first_step
    for _ in range(3):
        stopwatch.step_done()
        stopwatch.epoch_done(50)
    assert stopwatch.samples_per_second == 2 * 50 / 4
    assert stopwatch.seconds_to_first_step == first
    assert 0 < first <= seconds_since_process_start()


def test_a_peers_memory_is_its_own_and_not_its_parents(tmp_path: Path) -> None:
    held = bytearray(200 * MEGABYTE)
    held[::4096] = b"x" * len(held[::4096])
    measure = "from tests.benchmarks.peers.stopwatch import peak_memory_bytes; print(peak_memory_bytes())"
    child = int(run_command(Command((sys.executable, "-c", measure), {"PYTHONPATH": str(PEERS.parents[2])}), tmp_path))
    assert child < len(held) < peak_memory_bytes()
