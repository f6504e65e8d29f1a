"""How the benchmark makes one run: the job file it gives us, the command's deadline, what a peer's stopwatch counts."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from protos.job_file import parse_job, to_dict
from tests.benchmarks.cases import CASES, Case
from tests.benchmarks.contenders import CONTENDERS, PEERS, Run, job, paceline, peer
from tests.benchmarks.data_set import write_data
from tests.benchmarks.measurement import (
    ENVIRONMENT,
    BenchmarkFailed,
    Command,
    PeerAbsent,
    make_environment,
    read_statement,
    run_command,
)
from tests.benchmarks.peers.stopwatch import Stopwatch, peak_memory_bytes, seconds_since_process_start
from tests.benchmarks.products import Product, record_step, recording, time_products

MEGABYTE = 1_000_000


def make_run(folder: Path, case: Case = CASES[0], python: str = sys.executable) -> Run:
    return Run(case, 3, write_data(folder, case.shortened()), folder, Path(python))


def test_two_ranks_of_ours_are_measured_and_leave_no_folder_behind(tmp_path, monkeypatch) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    (tmp_path / "run").mkdir()
    measured = paceline(2, "all_reduce")(make_run(tmp_path / "run"))
    assert measured.samples_per_second > 0
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("ranks", "sync"), [(1, "all_reduce"), (2, "all_reduce"), (2, "parameter_server")])
def test_our_job_file_is_valid_and_of_the_network_that_is_timed(
    case: Case, ranks: int, sync: str, tmp_path: Path
) -> None:
    spec = parse_job(json.dumps(job(make_run(tmp_path, case), ranks, sync)))
    kinds = [layer if isinstance(layer, str) else next(iter(layer)) for layer in case.model]
    assert [layer.WhichOneof("kind") for layer in spec.model] == kinds
    assert spec.training.batch_size == ranks * case.batch_size
    assert spec.sync.WhichOneof("kind") == sync
    assert spec.workers == ranks


def test_the_convolutional_network_is_that_of_the_example() -> None:
    example = Path(__file__).parents[2] / "examples" / "fashion_mnist_cnn.yaml"
    wanted = parse_job(example.read_text(), folder=example.parent)
    case = next(case for case in CASES if case.kind == "cnn")
    ours = parse_job(json.dumps(to_dict(wanted) | {"model": list(case.model)}), folder=example.parent)
    assert list(ours.model) == list(wanted.model)
    assert case.batch_size == wanted.training.batch_size


@pytest.mark.parametrize("case", [CASES[0], CASES[-1]], ids=lambda case: case.name)
def test_the_products_of_a_step_are_all_there_and_nothing_else_is(case: Case, tmp_path: Path) -> None:
    _, products = record_step(parse_job(json.dumps(job(make_run(tmp_path, case), 1, "all_reduce"))))
    if case.kind == "mlp":
        # Forward, the weights' gradient, and the input's gradient where there is a layer before.
        least = most = 2 * case.batch_size * (2 * 784 * 128 + 3 * 128 * 10)
    else:
        tokens, width, context = case.batch_size * 128, 128, 128
        weights = 12 * width * width  # of a block: four square matrices and two four times as wide
        least = 3 * 2 * tokens * (4 * weights + 256 * width)
        most = least + 3 * 2 * tokens * 4 * 2 * context * width  # scores, of which a causal half may be left out
    assert least <= sum(product.flop for product in products) <= most
    assert time_products(products, 0.0) > 0


def test_a_product_with_a_vector_is_not_counted_and_numpy_is_left_as_it_was() -> None:
    functions = np.matmul, np.dot
    square, stack = np.ones((3, 3)), np.ones((5, 2, 3))
    with recording() as products:
        np.dot(square[0], square)
        np.matmul(square, square[0])
        result = np.matmul(stack, square)
    assert (np.matmul, np.dot) == functions
    assert (result == 3).all()
    assert [product.flop for product in products] == [2 * 5 * 2 * 3 * 3]
    assert products == [Product(np.matmul, stack, square, None)]


def test_every_peer_is_a_script_that_is_there() -> None:
    names = {path.name for path in PEERS.glob("*.py")}
    assert {"pytorch_eager.py", "pytorch_compile.py", "jax_jit.py", "scikit_learn.py", "pytorch_ddp.py"} <= names
    assert [contender.ranks for contender in CONTENDERS if not contender.ours] == [1, 1, 1, 1, 2, 2]


def test_a_peer_that_says_it_is_absent_is_absent(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("""#!/bin/sh\necho '{"absent": "no compiler"}'\n""")
    python.chmod(0o755)
    with pytest.raises(PeerAbsent, match="no compiler"):
        peer("pytorch_compile.py")(make_run(tmp_path, python=str(python)))


@pytest.mark.parametrize("output", ["fine", "3", "{}\nthen this"])
def test_a_last_line_that_is_no_object_is_no_result(output: str) -> None:
    with pytest.raises(BenchmarkFailed, match="not a result"):
        read_statement(output)


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


def test_no_contender_hears_a_wish_for_the_kernels_of_one() -> None:
    inherited = {"OPENBLAS_CORETYPE": "Haswell", "MKL_DEBUG_CPU_TYPE": "5", "PATH": "/bin"}
    seen = make_environment(inherited, Command((), {"OWN": "1"}))
    assert seen == {"PATH": "/bin", "OWN": "1", **ENVIRONMENT}


def test_a_peer_that_is_silent_or_babbles_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkFailed, match="printed no result"):
        peer("pytorch_eager.py")(make_run(tmp_path, python="/bin/true"))
    with pytest.raises(BenchmarkFailed, match="not a result"):
        peer("pytorch_eager.py")(make_run(tmp_path, python="/bin/echo"))


def test_a_peers_first_epoch_starts_the_clock_and_is_not_counted() -> None:
    seconds = iter([100.0, 102.0, 104.0])
    busy_seconds = iter([50.0, 53.0, 56.0])
    stopwatch = Stopwatch(clock=lambda: next(seconds), busy_clock=lambda: next(busy_seconds))
    stopwatch.step_done()
    first = stopwatch.seconds_to_first_step
    for _ in range(3):
        stopwatch.step_done()
        stopwatch.epoch_done(50)
    assert stopwatch.samples_per_second == 2 * 50 / 4
    assert stopwatch.busy_cores == 6 / 4
    assert stopwatch.seconds_to_first_step == first
    assert 0 < first <= seconds_since_process_start()


def test_a_peers_memory_is_its_own_and_not_its_parents(tmp_path: Path) -> None:
    held = bytearray(200 * MEGABYTE)
    held[::4096] = b"x" * len(held[::4096])
    measure = "from tests.benchmarks.peers.stopwatch import peak_memory_bytes; print(peak_memory_bytes())"
    child = int(run_command(Command((sys.executable, "-c", measure), {"PYTHONPATH": str(PEERS.parents[2])}), tmp_path))
    assert child < len(held) < peak_memory_bytes()
