"""Checkpoints written beside training: what was there when they were taken, one at a time, faults told in time."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from protos import job_pb2
from worker import checkpoint_writer
from worker.checkpoint import Checkpoint, list_checkpoints, newest_checkpoint, read_checkpoint
from worker.checkpoint_writer import CheckpointWriter
from worker.checkpointing import is_due
from worker.errors import CheckpointFault


def make(step: int, elements: int = 10) -> Checkpoint:
    vector = np.full(elements, step, np.float32)
    return Checkpoint(step, 0, 0, "digest", [], vector, {"velocity": vector + 1}, model_state=vector + 2)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written before it is set."""
    gate, write = threading.Event(), checkpoint_writer.write_checkpoint

    def wait_and_write(path: Path, checkpoint: Checkpoint) -> None:
        assert gate.wait(60)
        write(path, checkpoint)

    monkeypatch.setattr(checkpoint_writer, "write_checkpoint", wait_and_write)
    return gate


def test_what_is_written_is_what_was_there_when_it_was_taken(tmp_path: Path, gate: threading.Event) -> None:
    times: list[float] = []
    writer = CheckpointWriter(tmp_path, 2, 60, times.append)
    taken = make(1)
    path = writer.take(taken)
    for array in (taken.parameters, taken.state["velocity"], taken.model_state):
        array[:] = np.nan
    assert writer.busy
    assert not path.exists()
    gate.set()
    writer.wait()
    back = read_checkpoint(path)
    assert [array[0] for array in (back.parameters, back.state["velocity"], back.model_state)] == [1, 2, 3]
    assert abs(times[0] - time.time()) < 60


def test_the_next_one_waits_for_the_one_before_and_the_newest_few_stay(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, 2, 60)
    for step in range(1, 6):
        writer.take(make(step))
    writer.wait()
    assert [read_checkpoint(path).step for path in list_checkpoints(tmp_path)] == [4, 5]


def test_a_disk_that_takes_too_long_is_named_with_the_time(tmp_path: Path, gate: threading.Event) -> None:
    writer = CheckpointWriter(tmp_path, 2, 0.05)
    writer.take(make(1))
    with pytest.raises(CheckpointFault, match=r"a checkpoint is not written after 0\.05 s; name a folder on a faster"):
        writer.wait()
    gate.set()


def test_a_folder_that_is_gone_is_told_by_every_later_call(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "gone", 2, 60)
    writer.take(make(1))
    for call in (writer.wait, writer.check, lambda: writer.take(make(2))):
        with pytest.raises(CheckpointFault, match="cannot be written: No such file or directory; free some space or"):
            call()


LIMITED = """
import resource, sys
from pathlib import Path
from tests.unit.worker.test_checkpoint_writer import make
from worker.checkpoint_writer import CheckpointWriter
from worker.errors import CheckpointFault
writer = CheckpointWriter(Path(sys.argv[1]), 2, 60)
writer.take(make(1))
writer.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
writer.take(make(2, elements=1_000_000))
try:
    writer.wait()
except CheckpointFault as fault:
    print(fault)
"""


def test_a_disk_that_takes_no_more_leaves_the_one_before_and_no_scraps(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], cwd=Path(__file__).parents[3],
        capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    assert (
        "step-000000002.safetensors: cannot be written: File too large; free some space or name another" in done.stdout
    )
    assert os.listdir(tmp_path) == ["step-000000001.safetensors"]
    assert newest_checkpoint(tmp_path, print).step == 1


@pytest.mark.parametrize(
    ("seconds", "steps", "step", "since", "took", "writing", "due"),
    [
        (60, 0, 7, 59, 0.1, False, False),
        (60, 0, 7, 60, 0.1, False, True),
        (60, 0, 7, 60, 0.1, True, False),  # one is still being written
        (60, 0, 7, 60, 9, False, False),  # writing would take more than a tenth of the time
        (60, 0, 7, 90, 9, False, True),
        (0, 0, 7, 1e6, 0, False, False),
        (0, 5, 7, 1e6, 0, False, False),
        (0, 5, 10, 0, 9, True, True),  # by steps exactly then
    ],
)
def test_when_a_checkpoint_is_due(seconds, steps, step, since, took, writing, due) -> None:
    training = job_pb2.Training(checkpoint_seconds=seconds, checkpoint_steps=steps)
    assert is_due(training, step, since, took, writing) == due
