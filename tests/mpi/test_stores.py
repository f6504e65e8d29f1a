"""A job whose files are in a store, under mpirun: fetched once by a machine's ranks, refused with one line."""

import json

import numpy as np
import pytest

from tests.mpi.mpirun import error_lines
from tests.unit.data.store_server import BUCKET, served

pytest.importorskip("s3fs", reason="no s3fs: pip install 'paceline[stores]'")

JOB = {
    "data": {"train": {"npz": {"path": f"s3://{BUCKET}/data.npz"}}},
    "model": [{"dense": {"units": 3}}],
    "loss": "softmax_cross_entropy",
    "optimizer": "sgd",
    "training": {"epochs": 1, "batch_size": 8},
}


@pytest.fixture
def requests(tmp_path, monkeypatch):
    (tmp_path / "remote").mkdir()
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-word")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    (tmp_path / "job.json").write_text(json.dumps(JOB))
    with served(tmp_path / "remote") as (endpoint, seen):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        yield seen


def test_the_ranks_of_a_machine_fetch_a_file_once_and_the_job_keeps_its_url(run_ranks, requests, tmp_path):
    random = np.random.default_rng(0)
    np.savez(tmp_path / "remote" / "data.npz", x=random.random((20, 4)), y=np.arange(20) % 3)
    done = run_ranks(3, ["-m", "worker", "train", tmp_path / "job.json", "-o", tmp_path / "out"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert len([request for request in requests if request.startswith("GET") and "data.npz" in request]) == 1
    kept = (tmp_path / "out" / "job.yaml").read_text()
    assert f"s3://{BUCKET}/data.npz" in kept
    assert "secret" not in kept


def test_a_file_the_store_does_not_have_is_one_line_and_no_output(run_ranks, requests, tmp_path):
    done = run_ranks(2, ["-m", "worker", "train", tmp_path / "job.json", "-o", tmp_path / "out"])
    assert done.returncode == 1
    errors = error_lines(done.stderr)
    assert errors == [f"error: s3://{BUCKET}/data.npz: no such file in the store; check the URL in the job file"]
    assert not (tmp_path / "out").exists()
