"""Reads the output folder of a job that has ended, file by file and piece by piece.

Rules: regular files only; a link is neither followed nor sent, so nothing outside the folder can leave by it, not even
when a file is swapped for a link between the listing and the opening (each is opened beneath its folder's handle).
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from protos import coordinator_pb2

PIECE_BYTES = 1024 * 1024


class FileChanged(Exception):
    """A file became shorter while it was read."""


def read_folder(folder: Path, piece_bytes: int = PIECE_BYTES) -> Iterator[coordinator_pb2.PullArtifactsResponse]:
    """Every file under the folder in the order of their paths. An empty file is one empty piece."""
    for here, folders, names, handle in os.fwalk(folder, follow_symlinks=False):
        folders.sort()
        for name in sorted(names):
            if stat.S_ISREG(os.stat(name, dir_fd=handle, follow_symlinks=False).st_mode):
                path = (Path(here) / name).relative_to(folder).as_posix()
                yield from _pieces(os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=handle), path, piece_bytes)


def _pieces(descriptor: int, path: str, piece_bytes: int) -> Iterator[coordinator_pb2.PullArtifactsResponse]:
    digest = hashlib.sha256()
    with os.fdopen(descriptor, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        offset = 0
        while True:
            data = file.read(min(piece_bytes, size - offset))
            digest.update(data)
            last = offset + len(data) == size
            if not data and not last:
                raise FileChanged(f"{path} was {size} bytes long and ended at {offset}")
            yield coordinator_pb2.PullArtifactsResponse(
                path=path, offset=offset, data=data, size=size, sha256=digest.hexdigest() if last else ""
            )
            if last:
                return
            offset += len(data)
