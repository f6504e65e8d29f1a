"""A data file on disk: that it is there and what the operating system says when it is not.

Rules: every fault of the file system becomes one DataFault that begins with the path. Readers of a format begin with
`size_of` and open through `opened`, so that no format has to know these faults again.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase, BufferedReader
from typing import Any

from numpy.typing import NDArray

from worker.data.confinement import confined
from worker.data.stores import cache_folder
from worker.errors import DataFault

DEFLATE_MAX_RATIO = 1032  # no deflate stream unpacks to more than this many times its size (zlib's technical notes)


def size_of(path: str) -> int:
    """Size in bytes of a data file that exists, is a regular file and is not empty; DataFault otherwise."""
    try:
        with reachable(path) as here:
            status = os.stat(here)
    except FileNotFoundError:
        folder = os.path.dirname(path) or "."
        missing = (
            "no such file" if os.path.isdir(folder) else f"no such file: the folder {folder} does not exist either"
        )
        raise DataFault(f"{path}: {missing}; check the path in the job file") from None
    except OSError as error:
        raise DataFault(f"{path}: cannot be looked at: {error.strerror}; check the path and its permissions") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise DataFault(f"{path}: is {kind}; give the path of a data file")
    if status.st_size == 0:
        raise DataFault(f"{path}: is empty (0 bytes); fetch or write it again")
    return status.st_size


@contextmanager
def reachable(path: str) -> Iterator[str]:
    """The path to open for it, good until the block ends; DataFault where the coordinator lets no job read it."""
    with confined(path, own=(cache_folder(),)) as here:
        yield here


@contextmanager
def opened(path: str) -> Iterator[BufferedReader]:
    """The file, open for reading bytes; what the operating system refuses, now or later, is a DataFault."""
    try:
        with reachable(path) as here, open(here, "rb") as file:
            yield file
    except OSError as error:
        if error.strerror is None:  # not from the operating system: the format's own business
            raise
        raise DataFault(f"{path}: cannot be read: {error.strerror}; check the file and its permissions") from error


def fill(values: NDArray[Any], stream: BufferedIOBase) -> int:
    """Read the bytes of a C-contiguous array from the stream; how many came, fewer than it has if the stream ended."""
    room = values.reshape(-1).view("u1").data
    filled = 0
    while filled < len(room):
        count = stream.readinto(room[filled:])
        if not count:
            break
        filled += count
    return filled
