"""Checkpoints: complete or absent, found newest first, damage named and skipped."""

import os
from pathlib import Path

import numpy as np
import pytest

from worker.checkpoint import (
    Checkpoint,
    checkpoint_path,
    list_checkpoints,
    newest_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    write_atomically,
    write_checkpoint,
)
from worker.errors import CheckpointFault


def make(step: int) -> Checkpoint:
    random = np.random.default_rng(step)
    vector = random.standard_normal(10).astype(np.float32)
    return Checkpoint(step, step // 10, step * 32, "digest", [(0, 4), (6, 8)], vector, {"first_moment": vector * 2})


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a.safetensors", make(10))
    back = read_checkpoint(tmp_path / "a.safetensors")
    assert (back.step, back.epoch, back.samples, back.layout_digest) == (10, 1, 320, "digest")
    assert back.decayed == [(0, 4), (6, 8)]
    assert np.array_equal(back.parameters, make(10).parameters)
    assert np.array_equal(back.state["first_moment"], make(10).state["first_moment"])


def test_the_newest_readable_checkpoint_is_taken_and_damage_is_named(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write_checkpoint(checkpoint_path(tmp_path, step), make(step))
    damaged = checkpoint_path(tmp_path, 30)
    damaged.write_bytes(damaged.read_bytes()[:-7])
    said: list[str] = []
    assert newest_checkpoint(tmp_path, said.append).step == 20
    assert len(said) == 1
    assert "step-000000030" in said[0]


def test_a_folder_with_no_good_checkpoint_says_so(tmp_path: Path) -> None:
    checkpoint_path(tmp_path, 1).write_bytes(b"nonsense")
    with pytest.raises(CheckpointFault, match="1 damaged"):
        newest_checkpoint(tmp_path, lambda line: None)


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write_checkpoint(checkpoint_path(tmp_path, step), make(step))
    prune_checkpoints(tmp_path, keep=2)
    assert [read_checkpoint(path).step for path in list_checkpoints(tmp_path)] == [3, 4]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointFault, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
