"""One copy of the weights on each node; and where shared memory is not wanted or too small, every rank is a node."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.mpi.conftest import ENVIRONMENT, PROJECT, command_line
from tests.mpi.jobs import assert_close, summary, train, write_data, write_job

PROGRAM = Path(__file__).with_name("programs") / "memory.py"
PARAMETERS = 8_000_000
SMALL_MEMORY = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data.npz")


def test_without_shared_memory_every_rank_is_a_node_and_the_weights_are_the_same(run_ranks, data, tmp_path) -> None:
    sync = {"all_reduce": {"shared_memory": False}}
    off = tmp_path / "off.json"
    job = json.loads(write_job(tmp_path, data).read_text())
    off.write_text(json.dumps(job | {"sync": sync}))
    reference = train(run_ranks, 1, off, tmp_path / "one")
    for ranks in (2, 3):
        folder = tmp_path / str(ranks)
        done = run_ranks(ranks, ["-m", "worker", "train", off, "-o", folder])
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert "shared memory is not used: sync.all_reduce.shared_memory is off; every rank is its own node" in lines
        exchange = summary(folder)["exchange"]
        kilobytes = f"{exchange['bucket_bytes'] / 1e3:.0f} KB"
        assert f"gradients travel between nodes in one bucket of {kilobytes}" in lines  # of so small a model
        assert exchange["buckets_started_in_backward"] > 0
        assert_close(train(run_ranks, ranks, off, folder.with_suffix(".again")), reference)
    assert "exchange" not in summary(tmp_path / "one")


def test_a_dev_shm_too_small_makes_every_rank_a_node_with_a_line_that_says_so(run_ranks, data, tmp_path) -> None:
    unshare = shutil.which("unshare")
    mounted = unshare and subprocess.run([unshare, "-m", "sh", "-c", SMALL_MEMORY, "sh", "true"], capture_output=True)
    if not mounted or mounted.returncode != 0:
        pytest.skip("no mount namespace can be made here: needs `unshare` and the right to mount")
    job, folder = write_job(tmp_path, data, training={"epochs": 2}), tmp_path / "out"
    command = command_line(2, ["-m", "worker", "train", job, "-o", folder])
    done = subprocess.run(
        [unshare, "-m", "sh", "-c", SMALL_MEMORY, "sh", *command],
        capture_output=True, text=True, timeout=60, check=False,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(PROJECT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "shared memory is not used: " in done.stdout
    assert "/dev/shm has 1 MB free" in done.stdout
    assert "every rank is its own node" in done.stdout


def test_the_ranks_of_a_node_hold_one_copy_of_the_weights(run_ranks, tmp_path) -> None:
    """Proportional set size counts a shared page once over all who share it.

    The weights and Adam's two moments exist once however many ranks there are; each rank adds its gradient. A second
    copy of anything would be a whole vector more; what half a vector allows for is MPI's, and the share of libraries
    that changes as other programs come and go.
    """
    vector = 4 * PARAMETERS
    for ranks in (1, 2, 4):
        output = tmp_path / f"{ranks}.npy"
        done = run_ranks(ranks, [PROGRAM, output, PARAMETERS])
        assert done.returncode == 0, done.stderr
        grown = np.load(output).sum()
        expected = (1 + 2 + ranks) * vector
        assert abs(grown - expected) < 0.5 * vector, f"{ranks} ranks"
