"""The benchmark of what training reaches: its text, its jobs, what it believes, its table, one run of our side."""

import gzip
import json
import math
from pathlib import Path

import pytest

from protos.job_file import parse_job, read_job_file
from tests.benchmarks.measurement import BenchmarkFailed
from tests.benchmarks.quality import (
    EXAMPLE,
    OURS,
    PEER,
    TRIALS,
    Reached,
    Result,
    describe,
    make_cnn_job,
    make_transformer_job,
    quality_table,
    read_reached,
    run_ours,
)
from tests.benchmarks.real_text import MOST_BYTES, bytes_for, join_texts, list_texts, split

STATED = {"validation_loss": 0.3, "validation_accuracy": 0.9, "samples_per_second": 100.0}


def test_the_text_is_licences_then_packages_in_order_each_file_once(tmp_path: Path) -> None:
    licences, packages = tmp_path / "licenses", tmp_path / "doc"
    for folder in (licences, packages / "b", packages / "a"):
        folder.mkdir(parents=True)
    (licences / "GPL-3").write_text("gpl ")
    (licences / "GPL").symlink_to("GPL-3")
    (packages / "a" / "changelog.gz").write_bytes(gzip.compress(b"a changes "))
    (packages / "a" / "README").write_text("not taken")
    (packages / "b" / "copyright").write_text("b notes ")
    (packages / "b" / "changelog.gz").write_bytes(b"damaged")
    (packages / "c").symlink_to("b")
    paths = list_texts(licences, packages)
    assert join_texts(paths, 1000) == b"gpl a changes b notes "
    assert join_texts(paths, 6) == b"gpl a "


@pytest.mark.parametrize("batches", [1, 2, 7])
def test_a_text_of_the_right_length_has_so_many_batches_and_a_tenth_held_out(batches: int) -> None:
    text = bytes(index % 251 for index in range(bytes_for(batches * 32, 16)))
    parts = split(text, context=16, batch_size=32)
    assert len(parts.training) == batches * 32 * 16 + 1
    assert text.startswith(parts.training)
    assert text.endswith(parts.validation)
    assert len(parts.validation) == len(text) // 10
    assert len(parts.training) + len(parts.validation) <= len(text)


def test_a_text_that_is_too_short_is_refused_and_none_is_longer_than_the_most() -> None:
    with pytest.raises(ValueError, match="a text of 100 bytes is too short for a batch of 4 x 64"):
        split(bytes(100), context=64, batch_size=4)
    assert bytes_for(10**9, 128) == MOST_BYTES


def test_the_jobs_are_valid_and_the_cnn_is_the_example_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.benchmarks.quality.join_texts", lambda paths, most_bytes: bytes(most_bytes))
    transformer = make_transformer_job(tmp_path, quick=False)
    assert parse_job(json.dumps(transformer)).workers == 2
    assert describe(TRIALS[1], transformer).endswith("steps: 400")
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    cnn = make_cnn_job(tmp_path, quick=False)
    assert parse_job(json.dumps(cnn)) == read_job_file(EXAMPLE)
    assert describe(TRIALS[0], cnn) == "fashion_mnist_cnn.yaml, epochs: 5"


def test_what_a_machine_lacks_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    with pytest.raises(BenchmarkFailed, match=r"train-images.*: apt-get install dataset-fashion-mnist"):
        make_cnn_job(tmp_path, quick=False)
    with pytest.raises(BenchmarkFailed, match="/usr/share/doc: a text of 0 bytes is too short"):
        make_transformer_job(tmp_path, quick=False)


def test_a_side_that_learned_nothing_or_states_nothing_is_refused() -> None:
    assert read_reached(STATED, 2.0, 10) == Reached(0.3, 0.9, 100.0, 2.0)
    with pytest.raises(BenchmarkFailed, match=r"did not learn: its validation loss is 2\.303, guessing has 2\.303"):
        read_reached(STATED | {"validation_loss": math.log(10)}, 2.0, 10)
    with pytest.raises(BenchmarkFailed, match="states validation_accuracy as None"):
        read_reached({"validation_loss": 0.3, "samples_per_second": 1.0}, 2.0, 10)


def test_the_table_shows_each_seed_in_bits_and_the_middle_of_the_seconds() -> None:
    ours = [Reached(math.log(2) * bits, 0.5, 100.0, seconds) for bits, seconds in ((3.0, 10.0), (3.5, 12.0))]
    table = quality_table(Result(TRIALS[1], "text", {OURS: ours, PEER: ours}))
    assert table.headings[3:5] == ("bits per byte, seed 1", "bits per byte, seed 2")
    assert table.rows[0] == ("text", "2", OURS, "3.000", "3.500", "11.0 [10.0 .. 12.0]", "100")


def test_our_side_runs_as_typed_and_is_timed(tmp_path: Path) -> None:
    job = {
        "data": {"train": {"built_in": "digits"}, "validation_fraction": 0.2, "scale": 1 / 16},
        "model": [{"dense": {"units": 10}}],
        "loss": "softmax_cross_entropy",
        "optimizer": {"adam": {"learning_rate": 0.01}},
        "training": {"epochs": 2},
        "workers": 2,
    }
    job_file = tmp_path / "job.json"
    job_file.write_text(json.dumps(job))
    reached = run_ours(job_file, tmp_path, classes=10)
    assert reached.validation_accuracy > 0.5
    assert reached.command_seconds > 0
