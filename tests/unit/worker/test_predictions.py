"""Predictions say the same in every form."""

import csv
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from protos.job_file import parse_job
from worker.data.preprocessing import Preprocessing
from worker.engine.model import Model
from worker.errors import DataFault, OutputFault, UsageFault
from worker.model_file import write_model
from worker.predictions import WRITERS, choose_writer
from worker.use import predict_file


def written(form, outputs, labels):
    file = io.BytesIO()
    WRITERS[form](iter([outputs[:3], outputs[3:]]), outputs.shape[1:], labels, file)
    return file.getvalue()


@pytest.mark.parametrize("shape", [(4,), (2, 3)])
@pytest.mark.parametrize("labels", [True, False])
def test_every_form_holds_the_same_outputs_and_labels(shape, labels):
    outputs = np.random.default_rng(0).random((5, *shape)).astype(np.float32)
    predicted, flat = outputs.argmax(axis=-1), outputs.reshape(5, -1)

    names, *rows = csv.reader(io.StringIO(written("csv", outputs, labels).decode()))
    count = predicted.reshape(5, -1).shape[1] if labels else 0
    assert len(names) == count + flat.shape[1]
    assert [[int(cell) for cell in row[:count]] for row in rows] == predicted.reshape(5, -1)[:, :count].tolist()
    np.testing.assert_allclose(np.array([row[count:] for row in rows], np.float32), flat, rtol=1e-6)

    lines = [json.loads(line) for line in written("jsonl", outputs, labels).splitlines()]
    np.testing.assert_array_equal(np.array([line["outputs"] for line in lines], np.float32), outputs)
    assert [line.get("label") for line in lines] == (predicted.tolist() if labels else [None] * 5)

    with np.load(io.BytesIO(written("npz", outputs, labels))) as archive:
        np.testing.assert_array_equal(archive["outputs"], outputs)
        assert set(archive) == ({"outputs", "labels"} if labels else {"outputs"})
        if labels:
            np.testing.assert_array_equal(archive["labels"], predicted)


def test_json_lines_hold_no_nan():
    line = json.loads(written("jsonl", np.array([[np.nan, 1.0]], np.float32), False))
    assert line == {"outputs": [None, 1.0]}


def test_the_form_goes_by_the_option_then_the_ending_then_csv():
    assert choose_writer("jsonl", Path("a.csv")) is WRITERS["jsonl"]
    assert choose_writer("json", None) is WRITERS["jsonl"]
    assert choose_writer(None, Path("a.NPZ")) is WRITERS["npz"]
    assert choose_writer(None, None) is WRITERS["csv"]
    with pytest.raises(UsageFault, match=re.escape("a.txt: its ending is none of .csv, .npz, .jsonl")):
        choose_writer(None, Path("a.txt"))
    with pytest.raises(UsageFault, match="name a file with -o"):
        choose_writer("npz", None)


def test_csv_leaves_the_callers_file_open_also_when_its_reader_has_left():
    class Left(io.BytesIO):
        def write(self, data) -> int:
            raise BrokenPipeError

    file = Left()
    with pytest.raises(BrokenPipeError):
        WRITERS["csv"]([np.zeros((1, 2), np.float32)], (2,), True, file)
    assert not file.closed


@pytest.fixture
def folder(tmp_path: Path):
    """The output folder of a model of text, 6 bytes at a time."""
    layers = "{embedding: {vocabulary: 256, units: 4}}, positions, {linear: {units: 256}}"
    data = "{train: {text: {path: gone.txt, context: 6}}}"
    job = parse_job(f"{{data: {data}, model: [{layers}], loss: softmax_cross_entropy, optimizer: sgd}}")
    model = Model(job.model, job.loss, (6,))
    model.attach(np.random.default_rng(0).standard_normal(model.parameter_count).astype(np.float32))
    write_model(tmp_path, job, model, Preprocessing())
    return tmp_path


def test_a_model_of_text_reads_the_bytes_of_any_file_and_tells_what_it_leaves_out(folder, capsys):
    text = bytes(range(200, 220))
    (folder / "a.txt").write_bytes(text)
    np.save(folder / "a.npy", np.frombuffer(text[:18], np.uint8).reshape(3, 6))
    predict_file(folder, folder / "a.txt", folder / "of_text.npz")
    assert f"note: {folder / 'a.txt'}: the last 2 bytes fill no window of 6 bytes" in capsys.readouterr().err
    predict_file(folder, folder / "a.npy", folder / "of_array.npz")
    assert capsys.readouterr().err == ""
    with np.load(folder / "of_text.npz") as of_text, np.load(folder / "of_array.npz") as of_array:
        assert of_text["outputs"].shape == (3, 6, 256)
        np.testing.assert_allclose(of_text["outputs"].sum(axis=-1), 1, rtol=1e-5)
        np.testing.assert_array_equal(of_text["outputs"], of_array["outputs"])
        np.testing.assert_array_equal(of_text["labels"], of_array["labels"])


def test_a_text_shorter_than_a_window_is_refused(folder):
    (folder / "a.txt").write_bytes(b"short")
    with pytest.raises(DataFault, match=re.escape("a.txt: holds 5 bytes, and the model takes 6 at a time")):
        predict_file(folder, folder / "a.txt", folder / "a.csv")
    assert not (folder / "a.csv").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "job.yaml", "a.txt", "checkpoints", "none/a.csv", "pipe"])
def test_predictions_replace_neither_the_run_nor_the_input_nor_what_is_no_file(folder, name):
    (folder / "a.txt").write_bytes(b"text of a file")
    (folder / "job.yaml").write_text("kept")
    (folder / "checkpoints").mkdir()
    os.mkfifo(folder / "pipe")

    def left() -> dict[Path, tuple[int, int, int]]:  # when a file was last read may change
        return {path: (at.st_ino, at.st_size, at.st_mtime_ns) for path in folder.iterdir() if (at := path.stat())}

    before = left()
    with pytest.raises(OutputFault, match="name another file with -o"):
        predict_file(folder, folder / "a.txt", folder / name, "csv")
    assert left() == before


def test_a_token_that_the_model_does_not_know_is_named_with_its_file_and_sample(folder):
    tokens = np.zeros((700, 6), np.int64)
    tokens[601:, 2:] = 256
    np.save(folder / "tokens.npy", tokens)
    with pytest.raises(DataFault, match=r"tokens.npy: sample 601 \(counted from 0\) has 256 where a token is expected"):
        predict_file(folder, folder / "tokens.npy", folder / "a.csv")
    assert not (folder / "a.csv").exists()


def test_the_target_column_that_a_table_still_holds_is_no_feature(tmp_path):
    job = parse_job(
        "{data: {train: {csv: {path: /train.csv, target: y}}}, model: [{dense: {units: 2}}],"
        " loss: mean_squared_error, optimizer: sgd}"
    )
    model = Model(job.model, job.loss, (2,))
    model.attach(np.arange(model.parameter_count, dtype=np.float32))
    write_model(tmp_path, job, model, Preprocessing())
    (tmp_path / "with.csv").write_text("a,y,b\n1,9,2\n3,9,4\n")
    (tmp_path / "without.csv").write_text("a,b\n1,2\n3,4\n")
    (tmp_path / "other.csv").write_text("a,b,z\n1,2,9\n")
    for name in ("with", "without"):
        predict_file(tmp_path, tmp_path / f"{name}.csv", tmp_path / f"{name}.jsonl")
    assert (tmp_path / "with.jsonl").read_text() == (tmp_path / "without.jsonl").read_text() != ""
    with pytest.raises(DataFault, match=r"shape \(3,\), and .* on \(2,\): leave out what is no feature, such as the t"):
        predict_file(tmp_path, tmp_path / "other.csv", tmp_path / "other.jsonl")
