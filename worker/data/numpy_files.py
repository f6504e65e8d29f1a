"""NumPy's own files: npy, memory-mapped, and npz, read into memory.

Rules: no pickle is ever loaded, and nothing is allocated or mapped before the size that an array's header declares was
held against the bytes that are there.
"""

import math
import struct
import zipfile
import zlib
from io import BufferedIOBase
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from worker.data.files import DEFLATE_MAX_RATIO, fill, opened, reachable, size_of
from worker.data.stored_array import StoredArray
from worker.errors import DataFault

NPY_MAGIC = b"\x93NUMPY"
ZIP_MAGIC = b"PK"
# What zipfile raises when an archive's directory or contents are not what its writer meant.
DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, OverflowError, NotImplementedError)


class _Header(NamedTuple):
    shape: tuple[int, ...]
    column_major: bool
    stored: np.dtype[Any]
    header_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.header_bytes + math.prod(self.shape) * self.stored.itemsize

    def __str__(self) -> str:
        return f"{self.stored} {self.shape}, {self.total_bytes} bytes in all"


def read_npy(path: str) -> StoredArray:
    """The array of an npy file, memory-mapped read-only: ranks of one machine share one copy. DataFault if damaged."""
    file_bytes = size_of(path)
    with opened(path) as file:
        header = _read_header(path, file)
    if header.total_bytes != file_bytes:
        raise DataFault(f"{path}: the npy header declares {header}, but the file has {file_bytes}; write it again")
    if math.prod(header.shape) == 0:  # an empty range cannot be mapped
        return StoredArray(np.empty(header.shape, header.stored), path)
    try:
        with reachable(path) as here:
            mapped = np.load(here, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:  # a limit on mappings, or a file that shrank since it was measured
        raise DataFault(f"{path}: cannot be memory-mapped: {error}; check the file") from error
    return StoredArray(np.asarray(mapped), path)  # a plain array over the map: indexing np.memmap itself is slower


def read_npz(path: str, *names: str) -> list[StoredArray]:
    """The named arrays of an npz archive, in memory; DataFault if one is missing or the archive is damaged."""
    file_bytes = size_of(path)
    with opened(path) as file:
        begins = file.read(6)
        if not begins.startswith(ZIP_MAGIC):
            hint = "; it is an npy file: name it under `npy`" if begins == NPY_MAGIC else "; write it with np.savez"
            raise DataFault(f"{path}: is not an npz archive (begins with {begins.hex(' ')}){hint}")
        try:
            with zipfile.ZipFile(file) as archive:
                return [_read_member(path, archive, name, file_bytes) for name in names]
        except DAMAGE as error:
            raise DataFault(
                f"{path}: the npz archive of {file_bytes} bytes is damaged ({error}); write it again"
            ) from error


def _read_member(path: str, archive: zipfile.ZipFile, name: str, file_bytes: int) -> StoredArray:
    place = f"{path}, array {name!r}"
    try:
        entry = archive.getinfo(f"{name}.npy")
    except KeyError:
        there = ", ".join(sorted(member.removesuffix(".npy") for member in archive.namelist())) or "none"
        raise DataFault(f"{path}: has no array {name!r}; the arrays there are: {there}") from None
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataFault(f"{place}: is compressed in a way NumPy never writes; write it with np.savez_compressed")
    if entry.compress_size > file_bytes or entry.file_size > DEFLATE_MAX_RATIO * max(entry.compress_size, 1):
        raise DataFault(
            f"{place}: declares {entry.file_size} bytes packed into {entry.compress_size}, "
            f"more than a file of {file_bytes} bytes can hold; write it again"
        )
    try:
        with archive.open(entry) as member:
            stream = cast(BufferedIOBase, member)
            header = _read_header(place, stream)
            if header.total_bytes != entry.file_size:
                raise DataFault(
                    f"{place}: the npy header declares {header}, the archive holds {entry.file_size}; write it again"
                )
            return StoredArray(_read_values(stream, header), place)
    except DAMAGE as error:
        raise DataFault(f"{place}: is damaged ({error}); write it again") from error
    except RuntimeError as error:  # how zipfile says that a password is needed
        raise DataFault(f"{place}: cannot be unpacked ({error}); write it with np.savez_compressed") from error


def _read_values(stream: BufferedIOBase, header: _Header) -> NDArray[Any]:
    values = np.empty(header.shape[::-1] if header.column_major else header.shape, header.stored)
    filled = fill(values, stream)
    if filled < values.nbytes:
        raise EOFError(f"ends after {header.header_bytes + filled} of {header.total_bytes} bytes")
    stream.read(1)  # the end of the member is where zipfile checks its checksum
    # Rows are read one at a time, so they are laid out one after the other, in the machine's byte order.
    rows = values.T if header.column_major else values
    return rows.astype(header.stored.newbyteorder("="), order="C", copy=False)


def _read_header(place: str, stream: BufferedIOBase) -> _Header:
    begins = stream.read(len(NPY_MAGIC))
    if begins != NPY_MAGIC:
        raise DataFault(f"{place}: is not an npy file (begins with {begins.hex(' ')}); write it with np.save")
    version = tuple(stream.read(2))
    readers = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}
    if version not in readers:
        raise DataFault(f"{place}: npy format version {version} is not known; write it with np.save")
    try:
        shape, column_major, stored = readers[version](stream)
    except Exception as error:  # NumPy documents ValueError; its parser lets TypeError, TokenError and others through
        reason = str(error).partition("\n")[0]
        raise DataFault(f"{place}: the npy header is damaged ({reason}); write it again with np.save") from None
    if min(shape, default=0) < 0:
        raise DataFault(f"{place}: the npy header declares the shape {shape}; write it again with np.save")
    if stored.kind not in "buif":
        held = "Python objects, which are never loaded" if stored.hasobject else f"{stored}, not numbers"
        raise DataFault(f"{place}: holds {held}; store integers or floats")
    return _Header(shape, column_major, stored, stream.tell())
