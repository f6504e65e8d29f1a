"""parquet: round trips against the arrays written, and faults that name column and row."""

import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protos import job_pb2
from worker.data.sources import Dataset, open_features, open_source
from worker.errors import DataFault

pyarrow = pytest.importorskip("pyarrow", reason="pip install 'paceline[parquet]'")
parquet = pytest.importorskip("pyarrow.parquet", reason="pip install 'paceline[parquet]'")

STORED = ["?", "u1", "i1", "u2", "i4", "i8", "u8", "f4", "f8"]


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def read(path: Path, target: str = "y", kind: str = "labels") -> Dataset:
    source = job_pb2.ParquetSource(path=str(path), target=target)
    return open_source(job_pb2.Source(parquet=source), kind)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(
    stored=st.lists(st.sampled_from(STORED), min_size=1, max_size=4),
    rows=st.integers(1, 50),
    group=st.integers(1, 50),
    seed=st.integers(0, 9),
)
def test_numbers_come_back_exactly(tmp_path: Path, stored: list[str], rows: int, group: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    columns = {f"c{i}": random.integers(0, 100, rows).astype(kind) for i, kind in enumerate(stored)}
    labels = random.integers(0, 9, rows)
    dataset = read(write(tmp_path / "a.parquet", {"y": labels, **columns}, row_group_size=group))
    np.testing.assert_array_equal(dataset.features, np.stack([*columns.values()], axis=1))
    np.testing.assert_array_equal(dataset.targets, labels)
    assert dataset.place == str(tmp_path / "a.parquet")


def test_a_column_of_values_is_a_target_for_regression(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"a": [1, 2], "price": [0.5, -1.5], "b": [3.25, 4.0]})
    dataset = read(path, "price", "values")
    assert dataset.features.tolist() == [[1, 3.25], [2, 4]]
    assert (dataset.targets.dtype, dataset.targets.tolist()) == (np.float32, [[0.5], [-1.5]])


@pytest.mark.parametrize(
    ("largest", "stored", "kept"), [(255, "i8", "u1"), (256, "i8", "i8"), (255, "f8", "f8"), (1, "?", "?")]
)
def test_whole_numbers_are_kept_in_a_byte_where_they_fit(tmp_path: Path, largest: int, stored: str, kept: str) -> None:
    path = write(tmp_path / "a.parquet", {"a": np.array([0, largest]).astype(stored), "y": [0, 1]})
    assert read(path).features.dtype == kept


def test_features_alone_are_every_column(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"a": [1, 2], "y": [3.5, 4.5]})
    np.testing.assert_array_equal(open_features(str(path)), [[1, 3.5], [2, 4.5]])
    np.testing.assert_array_equal(open_features(str(path), "y"), [[1], [2]])
    np.testing.assert_array_equal(open_features(str(path), "a"), [[3.5], [4.5]])
    np.testing.assert_array_equal(open_features(str(path), "b"), [[1, 3.5], [2, 4.5]])


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "absent": ({"a": [1], "label": [0]}, r"has no column 'y'; the columns are: a, label"),
    "twice": ({"a": [1], "y": [0], "Y": [1]}, r"has 2 columns named 'y'; give each column a name of its own"),
    "alone": ({"y": [0]}, r"has no column besides the target 'y'"),
    "text": ({"a": ["1"], "y": [0]}, r"column 'a' has type string; every column must hold integers, floats or bool"),
    "lists": ({"a": [[1, 2]], "y": [0]}, r"column 'a' has type list<.*int64>; every column"),
    "null type": ({"a": [None], "y": [0]}, r"column 'a' has type null; every column"),
    "null": ({"a": [1, 2, None], "y": [0, 0, 0]}, r"row 2 \(counted from 0\), column 'a' is null; every cell must be"),
    "null target": ({"a": [1, 2], "y": [0, None]}, r"row 1 \(counted from 0\), column 'y' is null"),
    "nan": ({"b": [0, 1], "a": [1.0, np.nan], "y": [0, 1]}, r"features at row 1 \(counted from 0\), column 'a': nan;"),
    "fraction": ({"a": [1], "y": [0.5]}, r"label 0\.5 at row 0 \(counted from 0\), column 'y' is not a whole number"),
    "no rows": ({"a": np.array([], int), "y": np.array([], int)}, r"holds 0 samples; at least one row is needed"),
    "index": ({"a": [1], "y": [0], "__index_level_0__": [0]}, r"'__index_level_0__' is the row index of pandas"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_table_that_cannot_be_trained_on_is_one_fault_that_names_column_and_remedy(tmp_path: Path, kind: str) -> None:
    columns, message = FAULTS[kind]
    path = tmp_path / "a.parquet"
    table = pyarrow.table(columns)
    parquet.write_table(table.rename_columns([name.lower() for name in columns]), path)
    with pytest.raises(DataFault) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert re.search(message, str(caught.value))


def test_a_null_is_named_by_its_row_in_the_whole_file(tmp_path: Path) -> None:
    column = [*range(150_000), None, 7]
    path = write(tmp_path / "a.parquet", {"a": column, "y": [0] * len(column)}, row_group_size=40_000)
    with pytest.raises(DataFault, match=r"row 150000 \(counted from 0\), column 'a' is null"):
        read(path)


@pytest.mark.parametrize("content", [b"a,y\n1,2\n", b"PK\x03\x04", b"P"])
def test_another_format_is_no_parquet_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataFault, match=r"a\.parquet: is not a parquet file \(begins with [0-9a-f ]+\)"):
        read(tmp_path / "a.parquet")


def test_a_file_cut_anywhere_is_one_fault(tmp_path: Path) -> None:
    content = write(tmp_path / "a.parquet", {"a": list(range(300)), "y": [0] * 300}).read_bytes()
    for length in range(8, len(content), 97):
        (tmp_path / "a.parquet").write_bytes(content[:length])
        with pytest.raises(DataFault, match="the parquet file breaks off"):
            read(tmp_path / "a.parquet")


def test_bytes_changed_anywhere_are_a_fault_or_numbers_and_nothing_else(tmp_path: Path) -> None:
    content = write(tmp_path / "a.parquet", {"a": list(range(300)), "y": [0] * 300}).read_bytes()
    random = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(content)
        for at in random.integers(4, len(content) - 4, 3):
            damaged[at] = random.integers(256)
        (tmp_path / "a.parquet").write_bytes(damaged)
        with suppress(DataFault):
            assert len(read(tmp_path / "a.parquet")) > 0


def test_without_pyarrow_the_fault_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", {"a": [1], "y": [0]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataFault, match=re.escape("pip install 'paceline[parquet]'")):
        read(path)


def test_a_parquet_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataFault, match=r"a\.parquet: no such file"):
        read(tmp_path / "a.parquet")
