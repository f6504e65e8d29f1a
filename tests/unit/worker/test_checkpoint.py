"""Checkpoints: complete or absent, found newest first, damage named and skipped."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from protos.job_file import parse_job
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
from worker.engine.model import Model
from worker.errors import CheckpointFault
from worker.sync.exchange import check_fits


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


def test_running_statistics_are_read_back_and_a_checkpoint_without_any_has_none(tmp_path: Path) -> None:
    state = np.arange(6, dtype=np.float32)
    checkpoint = replace(make(10), model_state=state, best=np.ones(10, np.float32), best_model_state=2 * state)
    for name, written in (("with", checkpoint), ("without", make(10))):
        write_checkpoint(tmp_path / name, written)
    back, without = read_checkpoint(tmp_path / "with"), read_checkpoint(tmp_path / "without")
    assert np.array_equal(back.model_state, state)
    assert np.array_equal(back.best_model_state, 2 * state)
    assert without.model_state is None
    assert back.state.keys() == without.state.keys() == {"first_moment"}


def test_a_checkpoint_must_hold_the_model_s_running_statistics() -> None:
    job = parse_job(
        json.dumps(
            {
                "data": {"train": {"built_in": "digits"}},
                "model": [{"dense": {"units": 4}}, "batch_norm", {"dense": {"units": 10}}],
                "loss": "softmax_cross_entropy",
                "optimizer": "sgd",
            }
        )
    )
    model = Model(job.model, job.loss, (8,))
    fitting = replace(make(10), layout_digest=model.layout_digest, model_state=np.zeros(8, np.float32))
    check_fits(fitting, model, job)
    with pytest.raises(CheckpointFault, match="has 0 running statistics and the model 8; start anew without --resume"):
        check_fits(replace(fitting, model_state=None), model, job)
