"""Where a coordinator lets workers read: judged when a file is opened, since links change after a job was taken."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from protos import job_pb2
from worker.data.confinement import confined
from worker.data.files import opened, size_of
from worker.data.sources import open_source
from worker.data.stores import local_path
from worker.errors import DataFault
from worker.initial_weights import open_initial_weights

OUTSIDE = "leads out of where this coordinator lets jobs read"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root, the only one, with a link in it that leads out."""
    root = tmp_path.resolve() / "root"
    root.mkdir()
    (tmp_path / "outside").mkdir()
    (root / "link").symlink_to(tmp_path / "outside")
    monkeypatch.setenv("PACELINE_DATA_ROOTS", json.dumps([str(root)]))
    return root


def source(kind: str, folder: Path) -> job_pb2.Source:
    """Files of a kind, made in the folder."""
    features, targets = np.arange(12, dtype=np.float32).reshape(6, 2), np.arange(6) % 2
    made = job_pb2.Source()
    if kind == "npy":
        np.save(folder / "x.npy", features)
        np.save(folder / "y.npy", targets)
        made.npy.features, made.npy.targets = str(folder / "x.npy"), str(folder / "y.npy")
    elif kind == "npz":
        np.savez(folder / "d.npz", x=features, y=targets)
        made.npz.path = str(folder / "d.npz")
    elif kind == "csv":
        (folder / "d.csv").write_text("a,y\n1,0\n2,1\n")
        made.csv.path, made.csv.target = str(folder / "d.csv"), "y"
    elif kind == "text":
        (folder / "d.txt").write_text("0123456789" * 10)
        made.text.path, made.text.context = str(folder / "d.txt"), 4
    elif kind == "idx":
        header = b"\0\0\x08\x01" + (6).to_bytes(4, "big")
        (folder / "x.idx").write_bytes(header + bytes(6))
        (folder / "y.idx").write_bytes(header + bytes(6))
        made.idx.images, made.idx.labels = str(folder / "x.idx"), str(folder / "y.idx")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"a": [1.0, 2.0], "y": [0, 1]}), folder / "d.parquet")
        made.parquet.path, made.parquet.target = str(folder / "d.parquet"), "y"
    return made


@pytest.mark.parametrize("kind", ["npy", "npz", "csv", "text", "idx", "parquet"])
def test_every_reader_reads_below_a_root_and_nothing_a_link_leads_to_outside(root, kind) -> None:
    inside = open_source(source(kind, root), "labels")
    assert str(root) in inside.place
    assert "/proc" not in inside.place
    assert len(np.asarray(inside.features).tobytes()) > 0  # also once the file it came from is closed
    with pytest.raises(DataFault, match=OUTSIDE):
        open_source(source(kind, root / "link"), "labels")


@pytest.mark.parametrize("make_bad", [
    lambda root: root / ".." / "outside" / "f",
    lambda root: root / "link" / "f",
    lambda root: root / "file-link",
    lambda root: Path("/etc/passwd"),
    lambda root: Path(f"{root}ed") / "f",
])  # fmt: skip
def test_neither_dots_nor_links_nor_likeness_of_names_lead_out(
    root, tmp_path, make_bad: Callable[[Path], Path]
) -> None:
    (tmp_path / "outside" / "f").write_text("secret")
    (tmp_path / "rooted").mkdir()
    (tmp_path / "rooted" / "f").write_text("secret")
    (root / "file-link").symlink_to(tmp_path / "outside" / "f")
    path = str(make_bad(root))
    with pytest.raises(DataFault, match=OUTSIDE):
        size_of(path)
    with pytest.raises(DataFault, match=OUTSIDE), opened(path):
        pass


def test_the_file_that_was_judged_is_the_one_that_is_read_whatever_becomes_of_the_link(root, tmp_path) -> None:
    (root / "good").write_text("good")
    (tmp_path / "outside" / "f").write_text("secret")
    (root / "data").symlink_to(root / "good")
    with confined(str(root / "data")) as held:
        (root / "other").symlink_to(tmp_path / "outside" / "f")
        os.replace(root / "other", root / "data")
        assert Path(held).read_text() == "good"
    with pytest.raises(DataFault, match=OUTSIDE), confined(str(root / "data")):
        pass


def test_initial_weights_are_confined_like_data(root, tmp_path) -> None:
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "outside" / "w.safetensors")
    with pytest.raises(DataFault, match=f"initialize_from: .*{OUTSIDE}"):
        open_initial_weights(root / "link" / "w.safetensors", None)


def test_a_pipe_holds_nobody_up(root) -> None:
    os.mkfifo(root / "pipe")
    with pytest.raises(DataFault, match="is not a regular file"):
        size_of(str(root / "pipe"))


def test_urls_are_held_against_the_roots_that_are_urls(root, monkeypatch) -> None:
    with pytest.raises(DataFault, match=OUTSIDE):
        local_path(f"file://{root}/x")
    monkeypatch.setenv("PACELINE_DATA_ROOTS", json.dumps([f"file://{root}"]))
    (root / "x").write_text("fetched")
    assert Path(local_path(f"file://{root}/x", cache=root / "cache")).read_text() == "fetched"
    with pytest.raises(DataFault, match=OUTSIDE):
        local_path(f"file://{root}/../outside/f")


def test_what_ships_with_the_package_and_what_was_fetched_is_read(root, tmp_path, monkeypatch) -> None:
    assert len(open_source(job_pb2.Source(built_in="digits"), "labels"))
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "f").write_text("fetched")
    assert size_of(str(tmp_path / "cache" / "f")) == 7


def test_without_roots_a_path_is_just_that(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("PACELINE_DATA_ROOTS", raising=False)
    with confined(str(tmp_path / "anything")) as path:
        assert path == str(tmp_path / "anything")
