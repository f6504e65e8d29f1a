"""What is tracked: README's file tree names all of it, no file has outgrown a reader, everything lints."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
MAX_LINES = 400
ROOMS = ("protos/", "worker/", "coordinator/")


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    if not (PROJECT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git clone, or git is missing: apt-get install git, and run this in a clone")
    # A clone owned by someone else, as in a container, is still read.
    listing = subprocess.run(
        ["git", "-c", f"safe.directory={PROJECT}", "ls-files", "-z"], cwd=PROJECT, capture_output=True, text=True
    )
    assert listing.returncode == 0, listing.stderr
    return [path for path in listing.stdout.split("\0") if path and (PROJECT / path).exists()]


@pytest.fixture(scope="module")
def file_tree() -> dict[str, str]:
    """The fenced block under `## File tree` of README.md: path -> phrase. A path that ends in / is a folder."""
    block = re.search(r"^## File tree\n.*?^```\w*\n(.*?)^```$", (PROJECT / "README.md").read_text(), re.M | re.S)
    assert block, "README.md has no fenced block under the heading `## File tree`"
    lines = [line.split(maxsplit=1) for line in block[1].splitlines() if line.strip()]
    assert [line for line in lines if len(line) != 2] == [], "a line of the file tree is `path  phrase`"
    assert len({path for path, _ in lines}) == len(lines), "a path is in the file tree twice"
    return {path: phrase.strip() for path, phrase in lines}


def test_the_file_tree_names_nothing_that_is_not_there(file_tree: dict[str, str], tracked: list[str]) -> None:
    folders = {f"{parent}/" for path in tracked for parent in Path(path).parents}
    assert [path for path in file_tree if path not in tracked and path not in folders] == []


def test_the_file_tree_covers_every_file_of_the_packages(file_tree: dict[str, str], tracked: list[str]) -> None:
    """A folder's line stands for its contents; what is in every package (__init__.py, py.typed) needs no line."""
    folders = tuple(path for path in file_tree if path.endswith("/") and path not in ROOMS)
    wanted = [path for path in tracked if path.startswith(ROOMS) and Path(path).name not in ("__init__.py", "py.typed")]
    assert [path for path in wanted if path not in file_tree and not path.startswith(folders)] == []


def test_no_python_file_is_longer_than_a_reader_holds(tracked: list[str]) -> None:
    lengths = {path: len((PROJECT / path).read_bytes().splitlines()) for path in tracked if path.endswith(".py")}
    assert {path: lines for path, lines in lengths.items() if lines > MAX_LINES} == {}


def test_what_the_build_generates_is_not_tracked(tracked: list[str]) -> None:
    assert [path for path in tracked if re.search(r"_pb2(_grpc)?\.pyi?$", path)] == []


def test_the_proto_files_lint() -> None:
    buf = Path(sys.executable).with_name("buf")
    if not os.access(buf, os.X_OK):
        pytest.skip("buf is not installed: make .venv/check-tools")
    done = subprocess.run([buf, "lint"], cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
