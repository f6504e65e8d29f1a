"""Predictions say the same in every form."""

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest

from worker.errors import UsageFault
from worker.predictions import WRITERS, choose_writer


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
