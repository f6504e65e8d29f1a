"""Checkpoints: complete or absent, found newest first, damage of any kind named and skipped."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from protos.job_file import parse_job
from worker.checked_file import damage, write_checked
from worker.checkpoint import (
    Checkpoint,
    checkpoint_path,
    list_checkpoints,
    newest_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    remove_leftovers,
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


MIDST = replace(make(7), batches=3, sums=(1.25, 7.0, 96), highest_loss=2.5e6, state={}, decayed=[])


@given(data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_bit_flipped_anywhere_or_a_byte_too_few_or_too_many_is_found(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a.safetensors"
    write_checkpoint(path, MIDST)
    whole = path.read_bytes()
    assert read_checkpoint(path).position == MIDST.position
    place = data.draw(st.integers(0, len(whole) - 1))
    flipped = bytes([whole[place] ^ 1 << data.draw(st.integers(0, 7))])
    wrong = st.sampled_from([whole[:place] + flipped + whole[place + 1 :], whole[:place], whole + whole[:1]])
    path.write_bytes(data.draw(wrong))
    with pytest.raises(CheckpointFault, match=r"a\.safetensors: is damaged: "):
        read_checkpoint(path)


def test_metadata_that_look_like_a_digest_are_not_taken_for_it(tmp_path: Path) -> None:
    path = tmp_path / "zeros.safetensors"
    for other in ("0" * 64, "ab" * 32, f'"sha256":"{"0" * 64}"'):
        write_checked(path, {"a": np.ones(3, np.float32)}, {"layout_digest": other, "z": other})
        assert damage(path) is None
        with safe_open(path, framework="numpy") as file:
            assert file.metadata()["layout_digest"] == file.metadata()["z"] == other


def test_the_safetensors_library_alone_opens_a_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", make(10))
    tensors = load_file(tmp_path / "a")
    assert tensors.keys() == {"parameters", "optimizer.first_moment"}
    assert np.array_equal(tensors["parameters"], make(10).parameters)


def test_files_that_are_no_checkpoints_of_ours_are_skipped_with_a_line_each(tmp_path: Path) -> None:
    write_checkpoint(checkpoint_path(tmp_path, 1), make(1))
    checkpoint_path(tmp_path, 2).write_bytes(b"")
    checkpoint_path(tmp_path, 3).write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    save_file({"parameters": np.zeros(3, np.float32)}, checkpoint_path(tmp_path, 4))  # without a checksum
    checkpoint_path(tmp_path, 5).mkdir()
    write_checked(
        checkpoint_path(tmp_path, 6), {"parameters": np.zeros(3, np.float32)}, {}
    )  # whole, but something else
    said: list[str] = []
    assert newest_checkpoint(tmp_path, said.append).step == 1
    assert [re.search(r"step-0*(\d)\.safetensors: (.*)$", line).groups() for line in said] == [
        ("6", "step is missing: this is not a checkpoint"),
        ("5", "cannot be read: Is a directory"),
        ("4", "is damaged: it holds no sha256"),
        ("3", "is damaged: it does not begin as a safetensors file does"),
        ("2", "is damaged: it does not begin as a safetensors file does"),
    ]


def test_what_a_killed_writer_left_and_what_was_skipped_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_checkpoint(checkpoint_path(tmp_path, step), make(step))
    checkpoint_path(tmp_path, 3).write_bytes(b"damaged")
    (tmp_path / ".step-000000004.safetensors.77.tmp").write_bytes(b"half")
    remove_leftovers(tmp_path, newest_checkpoint(tmp_path, lambda line: None).step)
    assert sorted(os.listdir(tmp_path)) == ["step-000000001.safetensors", "step-000000002.safetensors"]


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
