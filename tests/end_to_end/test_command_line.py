"""`paceline` as people run it: real processes, real mpirun, real digits."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.end_to_end.jobs import NEEDS_MPIRUN

BIN = Path(sys.executable).parent
pytestmark = NEEDS_MPIRUN
WAIT_SECONDS = 60.0
EXAMPLES = Path(__file__).parents[2] / "examples"

JOB_FILE = """\
name: digits
data: {train: {built_in: digits}, validation_fraction: 0.2, scale: 0.0625}
model: [dense: {units: 32}, relu, dense: {units: 10}]
loss: softmax_cross_entropy
optimizer: {adam: {learning_rate: 0.01}}
training: {epochs: 3, batch_size: 32, seed: 1}
workers: 2
"""
ENDLESS = ("--set", "training.epochs=100000")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "job.yaml").write_text(JOB_FILE)
    return tmp_path


def paceline(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "paceline"), *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "TMPDIR": str(folder)},  # a run that fails early leaves its logs there
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def start_endless(folder: Path) -> subprocess.Popen[str]:
    """A run that goes on until it is told otherwise, past its first epoch; its output folder is `out`."""
    command = [str(BIN / "paceline"), "run", "job.yaml", "-o", "out", *ENDLESS]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: list((folder / "out" / "checkpoints").glob("*")), "a checkpoint")
    return process


def wait_until(true, what: str):
    deadline = time.monotonic() + WAIT_SECONDS
    while not (value := true()):
        assert time.monotonic() < deadline, f"{what} within {WAIT_SECONDS} s"
        time.sleep(0.02)
    return value


def workers_of(folder: Path) -> list[int]:
    """The ranks that run in this folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                here = os.readlink(entry / "cwd") == str(folder)
            except OSError:
                continue
            if here and len(words) > 2 and words[1].endswith(b"/paceline-worker") and b"train" in words[2]:
                found.append(int(entry.name))
    return found


def test_run_trains_and_leaves_a_whole_output_folder(folder):
    done = paceline(folder, "run", "job.yaml", "-o", "out")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "digits: starting 2 workers"
    assert [line.split()[1] for line in lines if "val accuracy" in line] == ["1/3", "2/3", "3/3"]
    assert "digits: done" in lines
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert summary["world_size"] == 2
    assert summary["validation_accuracy"] > 0.9
    names = {path.name for path in (folder / "out").iterdir()}
    assert names >= {"model.safetensors", "job.yaml", "metrics.jsonl", "summary.json", "checkpoints", "logs"}
    assert (folder / "out" / "logs" / "rank-1.log").exists()


def test_run_goes_on_where_it_stopped_and_evaluate_agrees(folder):
    assert paceline(folder, "run", "job.yaml", "-o", "out", "--set", "training.epochs=1").returncode == 0
    assert paceline(folder, "run", "job.yaml", "-o", "out").returncode == 2
    done = paceline(folder, "run", "job.yaml", "-o", "out", "--resume", "--format", "json")
    *events, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert {event["report"]["epoch"] for event in events} == {2, 3}
    said = json.loads(paceline(folder, "evaluate", "out", "job.yaml", "--format", "json").stdout)
    assert said["accuracy"] == pytest.approx(last["summary"]["validation_accuracy"])


def test_run_says_at_its_start_what_became_of_the_initial_weights(folder):
    short = ("--set", "training.epochs=1")
    assert paceline(folder, "run", "job.yaml", "-o", "first", *short).returncode == 0
    initial = ("--set", "initialize_from=first/model.safetensors")
    done = paceline(folder, "run", "job.yaml", "-o", "second", *short, *initial)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    said = [number for number, line in enumerate(lines) if line.startswith("initialize_from: ")]
    assert "parameters taken from" in lines[said[0]]
    assert said[-1] < next(number for number, line in enumerate(lines) if line.startswith("epoch 1/1"))


def test_more_workers_than_cores_run_after_a_warning(folder):
    count = len(os.sched_getaffinity(0)) + 1
    done = paceline(folder, "run", "job.yaml", "-n", str(count), "-o", "out", "--set", "training.epochs=1")
    assert done.returncode == 0
    assert done.stderr.startswith(f"warning: {count} workers share {count - 1} cores")
    assert json.loads((folder / "out" / "summary.json").read_text())["world_size"] == count


def test_a_missing_data_file_is_one_message_and_nothing_is_half_written(folder):
    source = "data.train={npz: {path: none.npz}}"
    done = paceline(folder, "run", "job.yaml", "-o", "out", "--set", source)
    assert done.returncode == 1
    assert re.fullmatch(r"error: .*none\.npz.*\n", done.stderr)  # not again as a last line of the log
    assert [path.name for path in folder.iterdir()] == ["job.yaml"]  # no logs either: they say nothing else


def test_a_killed_worker_ends_the_run_and_is_named(folder):
    process = start_endless(folder)
    os.kill(workers_of(folder)[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 1
    killed = r"error: rank [01] on \S+ was killed by signal 9 \(SIGKILL\) in step \d+ \(epoch \d+\), phase \w+\n"
    assert re.match(killed, errors)
    assert errors.splitlines()[-1] == "  logs: out/logs"
    assert workers_of(folder) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_run_told_to_end_takes_its_workers_along_and_says_how_to_go_on(folder, number):
    process = start_endless(folder)
    process.send_signal(number)
    _, errors = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 128 + number
    remedy = "paceline run job.yaml -o out --set training.epochs=100000 --resume"
    assert errors == f"stopped by {number.name}; go on with: {remedy} (logs: out/logs)\n"
    assert workers_of(folder) == []
    said = (folder / "out" / "logs" / "rank-0.log").read_text()
    stopped = re.search(r"^stopped by SIGUSR1 after step (\d+); checkpoint (\S+): go on with --resume$", said, re.M)
    assert stopped, said
    checkpoints = sorted(path.name for path in (folder / "out" / "checkpoints").iterdir())
    assert checkpoints[-1] == Path(stopped[2]).name == f"step-{int(stopped[1]):09d}.safetensors"


def test_a_run_told_twice_to_end_waits_for_no_step(folder):
    process = start_endless(folder)
    os.kill(workers_of(folder)[0], signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 130
    assert errors.startswith("stopped by SIGINT; go on with: paceline run job.yaml")
    assert workers_of(folder) == []


def test_a_terminal_gets_a_live_bar(folder):
    control, terminal = pty.openpty()
    command = [str(BIN / "paceline"), "run", "job.yaml", "-o", "out", "--set", "training.epochs=40"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(command, cwd=folder, stdin=terminal, stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    seen = b""
    while True:
        try:
            seen += os.read(control, 65536)
        except OSError:  # the other side is closed: how a pseudo-terminal says end of file
            break
    os.close(control)
    assert process.wait(WAIT_SECONDS) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    assert re.search(r"epoch +\d+/40 .*━.* loss \d\.\d+  accuracy \d\.\d+  [\d,]+ samples/s .* left", text)
    assert "digits: done" in text


def test_a_reader_that_leaves_early_is_no_traceback(folder):
    command = f"{BIN / 'paceline'} --help | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)
    assert (done.stdout, done.stderr) == ("Usage: paceline [OPTIONS] COMMAND [ARGS]...\n", "")


def test_help_loads_neither_rich_nor_grpc_nor_the_workers_libraries():
    program = (
        "import sys; sys.argv = ['paceline', '--help']\n"
        "from coordinator.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([name for name in ('rich', 'grpc', 'numpy', 'mpi4py', 'sqlalchemy', 'google') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=WAIT_SECONDS
    )
    assert done.stdout.splitlines()[-1] == "[]"
