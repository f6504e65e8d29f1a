"""Reading an output folder in pieces."""

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.artifacts import FileChanged, read_folder


@given(st.binary(max_size=40), st.integers(1, 16))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_pieces_of_a_file_make_the_file(tmp_path: Path, content: bytes, piece_bytes: int) -> None:
    (tmp_path / "model").write_bytes(content)
    pieces = list(read_folder(tmp_path, piece_bytes))
    assert b"".join(piece.data for piece in pieces) == content
    assert [piece.offset for piece in pieces] == [0, *range(piece_bytes, len(content), piece_bytes)]
    assert {piece.size for piece in pieces} == {len(content)}
    assert [piece.sha256 for piece in pieces] == [""] * (len(pieces) - 1) + [hashlib.sha256(content).hexdigest()]


def test_folders_below_are_sent_with_forward_slashes_in_a_steady_order(tmp_path: Path) -> None:
    for name in ("b/z", "b/a", "a", "c/d/e"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [piece.path for piece in read_folder(tmp_path)] == ["a", "b/a", "b/z", "c/d/e"]


def test_nothing_leaves_by_a_link_and_nothing_waits_at_a_pipe(tmp_path: Path) -> None:
    outside, output = tmp_path / "outside", tmp_path / "output"
    outside.mkdir()
    output.mkdir()
    (outside / "secret").write_text("secret")
    (output / "file").symlink_to(outside / "secret")
    (output / "folder").symlink_to(outside)
    os.mkfifo(output / "pipe")
    (output / "kept").write_text("kept")
    assert [piece.path for piece in read_folder(output)] == ["kept"]


def test_a_file_that_shrinks_while_it_is_read_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"x" * 100_000)
    pieces = read_folder(tmp_path, 50_000)
    next(pieces)
    os.truncate(tmp_path / "model", 60_000)
    with pytest.raises(FileChanged, match="model was 100000 bytes long and ended at 60000"):
        list(pieces)
