"""The client verbs against a coordinator started by `paceline serve`: a job from submission to its pulled folder."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.jobs import NEEDS_MPIRUN

BIN = Path(sys.executable).parent
pytestmark = NEEDS_MPIRUN
WAIT_SECONDS = 60.0

JOB_FILE = """\
name: digits
data: {train: {built_in: digits}, validation_fraction: 0.2, scale: 0.0625}
model: [dense: {units: 32}, relu, dense: {units: 10}]
loss: softmax_cross_entropy
optimizer: {adam: {learning_rate: 0.01}}
training: {epochs: 3, batch_size: 32, seed: 1}
workers: 2
priority: 3
labels: {team: vision}
limits: {seconds: 3600, keep_for: 3600}
"""


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """ask("get", ID) runs a client verb against one coordinator with two slots."""
    folder = tmp_path_factory.mktemp("service")
    (folder / "job.yaml").write_text(JOB_FILE)
    command = [
        BIN / "paceline",
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--http",
        "127.0.0.1:0",
        "--state",
        "state",
        "--slots",
        "2",
        "--limit",
        "job.parameters=5000",
    ]
    with open(folder / "errors", "wb") as errors:
        serving = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=errors, text=True)
    address = re.search(r"grpc (\S+),", serving.stdout.readline())[1]

    def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [str(BIN / "paceline"), *arguments, "--server", address]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)
        assert done.returncode == code, done
        return done

    run.folder = folder
    yield run
    serving.terminate()
    assert serving.wait(WAIT_SECONDS) == 0
    serving.stdout.close()


def test_a_job_is_submitted_watched_read_and_pulled(ask):
    done = ask("submit", "job.yaml", "--watch")
    job_id, *lines = done.stdout.splitlines()
    assert any(line.startswith("epoch 3/3") for line in lines)
    assert "digits: SUCCEEDED" in done.stdout
    assert json.loads(ask("get", job_id, "--format", "json").stdout)["summary"]["validation_accuracy"] > 0.9
    # What ended long ago is told as if it ended now. (A slow machine reports within epochs too.)
    assert ask("watch", job_id).stdout.count("val accuracy") == 3
    assert "rank-0 | epoch 3/3" in ask("logs", job_id, "-f").stdout
    assert len(ask("metrics", job_id).stdout.splitlines()) >= 4
    assert job_id in ask("list").stdout
    assert job_id in ask("list", "--label", "team=vision", "--state", "succeeded").stdout
    assert ask("list", "--label", "team=speech").stdout == 'no jobs with labels.team="speech"\n'
    ask("pull", job_id, "-o", "pulled")
    assert "accuracy" in subprocess.run(
        [BIN / "paceline", "evaluate", "pulled", "job.yaml"], cwd=ask.folder, capture_output=True, text=True, check=True
    ).stdout  # fmt: skip
    assert "is already there" in ask("pull", job_id, "-o", "pulled", code=2).stderr


def test_a_cancelled_job_ends_and_watching_it_fails(ask):
    job_id = ask("submit", "job.yaml", "--set", "training.epochs=100000").stdout.strip()
    ask("cancel", job_id)
    done = ask("watch", job_id, code=1)
    assert done.stderr.startswith(f"error: job {job_id} is CANCELLED")


def test_a_model_with_more_parameters_than_allowed_fails_before_it_trains(ask):
    done = ask("submit", "job.yaml", "--watch", "--set", "model[0].dense.units=1000000", code=1)
    assert "model: has 75000010 parameters, and the coordinator's limit is job.parameters=5000: make it smaller" in (
        done.stderr
    )


def test_the_same_request_gives_the_same_job(ask):
    first, second = (ask("submit", "job.yaml", "--request-id", "once").stdout for _ in range(2))
    assert first == second
    ask("watch", first.strip())


def test_more_workers_than_slots_is_refused_with_the_place(ask):
    done = ask("submit", "job.yaml", "--set", "workers=3", code=2)
    assert done.stderr.startswith("error: workers: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_job_that_is_not_there_is_named(ask):
    for verb in ("get", "watch", "logs", "metrics", "cancel", "pull"):
        assert ask(verb, "nobody", code=1).stderr == (
            "error: there is no job 'nobody' here; `paceline list` shows those there are\n"
        )


def test_a_job_that_fails_says_why_once(ask):
    done = ask("submit", "job.yaml", "--watch", "--set", "data.train={npz: {path: none.npz}}", code=1)
    assert re.fullmatch(r"error: job \S+ is FAILED: .*none\.npz.*\n", done.stderr)
