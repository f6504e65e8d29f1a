"""csv: round trips against NumPy, and faults that name line and column."""

import csv
import re
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protos import job_pb2
from worker.data.sources import open_features, open_source
from worker.data.table import read_csv
from worker.errors import DataFault


def source(path: Path, target: str = "y") -> job_pb2.Source:
    return job_pb2.Source(csv=job_pb2.CsvSource(path=str(path), target=target))


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(
    rows=st.lists(
        st.tuples(*[st.floats(-1e30, 1e30, allow_nan=False)] * 2, st.integers(0, 10**6)), min_size=1, max_size=20
    ),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_numbers_come_back_exactly(tmp_path: Path, rows: list[tuple[float, float, int]], quoting: int) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, quoting=quoting)
        writer.writerow(["a", "y", "b, too"])
        writer.writerows((a, label, b) for a, b, label in rows)
    features, targets = read_csv(str(path), "y")
    np.testing.assert_array_equal(features.values, [row[:2] for row in rows])
    np.testing.assert_array_equal(targets.values[:, 0], [row[2] for row in rows])


@pytest.mark.parametrize(
    ("cells", "stored"),
    [("0,255", "u1"), ("-1,2.5", "f4"), ("0,256", "f4"), ("0.1,2", "f8"), ("16777217,1700000001", "f8")],
)
def test_numbers_are_kept_in_the_smallest_type_that_holds_them(tmp_path: Path, cells: str, stored: str) -> None:
    features = open_features(str(write(tmp_path / "a.csv", f"a,b\n{cells}\n")))
    assert features.dtype == stored
    assert features.tolist() == [[float(cell) for cell in cells.split(",")]]


@pytest.mark.parametrize(
    "text", ["a,y\n1,2\n", "\ufeffa,y\n1,2\n", "a, y \r\n 1 , 2\r\n", 'a,"y"\n\n"1",2\n\n', "a,y\n1,2"]
)
def test_byte_order_marks_line_ends_quotes_spaces_and_empty_lines_do_not_matter(tmp_path: Path, text: str) -> None:
    dataset = open_source(source(write(tmp_path / "a.csv", text)), "labels")
    assert (dataset.features.tolist(), dataset.targets.tolist()) == ([[1]], [2])
    assert dataset.place == str(tmp_path / "a.csv")


FAULTS = {
    "word": ("a,y\n1,2\n\n3,abc\n", r"line 4, column 'y': 'abc' is not a number; every cell must be a number"),
    "empty cell": ("a,y\n1,2\n,4\n", r"line 3, column 'a': is empty"),
    "underscore": ("a,y\n1_000,2\n", r"line 2, column 'a': '1_000' is not a number"),
    "comment": ("a,y\n1,2\n#,4\n", r"line 3, column 'a': '#' is not a number"),
    "short row": ("a,y\n1,2\n3\n", r"line 3 has 1 columns, line 1 names 2"),
    "long rows": ("a,y\n1,2,3\n4,5,6\n", r"line 2 has 3 columns, line 1 names 2"),
    "not a number": (
        "a,y\n1,2\n\nnan,3\n",
        r"features at line 4, column 'a': nan; every value must be a finite number",
    ),
    "infinity": ("a,y\n1,2\n-inf,3\n", r"features at line 3, column 'a': -inf; every value"),
    "too large": ("a,y\n1,2\n1e39,3\n", r"features at line 3, column 'a': 1e\+39, which float32 cannot hold"),
    "target not a number": ("a,y\n1,nan\n", r"targets at line 2, column 'y': nan"),
    "fractional label": ("a,y\n1,2\n2,1.5\n", r"label 1\.5 at line 3, column 'y' is not a whole number"),
    "negative label": ("a,y\n1,2\n2,-1\n", r"label -1.* at line 3, column 'y' is negative"),
    "no rows": ("a,y\n", r"holds 0 samples"),
    "no target": ("a,b\n1,2\n", r"has no column 'y'; the columns are: a, b"),
    "two targets": ("y,y\n1,2\n", r"has 2 columns named 'y'"),
    "target alone": ("y\n1\n", r"has no column besides the target 'y'"),
    "no names": ("1,2\n3,4\n", r"line 1 holds numbers \(1, 2\); the first line must be the names"),
    "semicolons": ("a;y\n1;2\n", r"line 1 is separated by semicolons \('a;y'\); separate the columns by commas"),
    "first line empty": ("\n1,2\n", r"line 1 is empty; the first line must be"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_bad_table_is_one_fault_that_names_line_and_column(tmp_path: Path, kind: str) -> None:
    text, message = FAULTS[kind]
    path = write(tmp_path / "a.csv", text)
    with pytest.raises(DataFault) as caught:
        open_source(source(path), "labels")
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert re.search(message, str(caught.value))


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a,y\n1,\xff\n"])
def test_what_is_not_utf8_text_is_said(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataFault, match="is not UTF-8 text"):
        open_source(source(tmp_path / "a.csv"), "labels")


def test_a_missing_target_among_many_columns_lists_the_first_ones(tmp_path: Path) -> None:
    names = [f"c{i}" for i in range(500)]
    path = write(tmp_path / "a.csv", ",".join(names) + "\n" + ",".join(["1"] * 500) + "\n")
    with pytest.raises(DataFault, match=r"columns are: c0, c1, .*, c19 and 480 more$"):
        read_csv(str(path), "y")


def test_a_million_cells_are_read_in_seconds(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    np.savetxt(
        path, np.random.default_rng(0).integers(0, 256, (1300, 785)), "%d", ",", header="y" + ",p" * 784, comments=""
    )
    started = time.perf_counter()
    features, _ = read_csv(str(path), "y")
    assert time.perf_counter() - started < 10  # about 0.2 s; a reader in Python takes several times as long
    assert features.values.dtype == np.uint8
