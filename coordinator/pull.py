"""Writes the pieces of a pulled output folder to disk.

Rules: nothing appears under the folder's name until every file is whole and its SHA-256 agrees. Paths come from the
server and are not trusted: they stay inside the folder. One rename puts the folder in place.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from coordinator.faults import CommandFault
from protos import coordinator_pb2
from protos.exit_codes import ExitCode


def check_destination(folder: Path) -> None:
    """Refuse a folder that holds anything: what is there belongs to somebody."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CommandFault(f"{folder} is already there; name another folder with -o", ExitCode.USAGE)


def write_folder(pieces: Iterable[coordinator_pb2.PullArtifactsResponse], folder: Path) -> tuple[int, int]:
    """Write every file and return how many files and bytes there were; CommandFault when the sender erred."""
    check_destination(folder)
    with _beside(folder) as partial:
        files = written = 0
        current, digest = "", hashlib.sha256()
        for piece in pieces:
            if piece.offset == 0:
                _check_whole(current)
                current, digest, size = piece.path, hashlib.sha256(), 0
            if piece.path != current or piece.offset != size:
                raise CommandFault(f"the coordinator sent the pieces of {piece.path!r} out of order; pull again")
            target = partial / _inside(piece.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "ab") as file:
                file.write(piece.data)
            digest.update(piece.data)
            size += len(piece.data)
            written += len(piece.data)
            if piece.sha256:
                if size != piece.size or digest.hexdigest() != piece.sha256:
                    raise CommandFault(f"{piece.path} arrived damaged: its SHA-256 does not agree; pull again")
                files += 1
                current = ""
        _check_whole(current)
        if not files:
            raise CommandFault("the job's output folder is empty: it ended before it wrote anything")
        _move(partial, folder)
    return files, written


def _check_whole(unfinished: str) -> None:
    if unfinished:
        raise CommandFault(f"{unfinished} arrived only in part; pull again")


def _inside(path: str) -> PurePosixPath:
    parts = PurePosixPath(path)
    if not path or parts.is_absolute() or ".." in parts.parts or "\0" in path:
        raise CommandFault(
            f"the coordinator sent a file named {path!r}, which lies outside the folder; nothing was written"
        )
    return parts


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A new folder on the same disk, gone again unless it was moved away."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise CommandFault(
            f"{folder.parent} cannot be written to: {error.strerror}; name another folder with -o"
        ) from error
    try:
        yield partial
    except OSError as error:
        raise CommandFault(f"{folder} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _move(partial: Path, folder: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    partial.chmod(0o777 & ~umask)  # mkdtemp made it ours alone
    partial.rename(folder)  # an empty folder gives way
