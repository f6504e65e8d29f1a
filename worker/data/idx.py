"""The idx format of MNIST and its kin, plain or gzip-compressed.

Two zero bytes, a type byte, the number of dimensions, each dimension as a big-endian uint32, then the numbers,
big-endian, last dimension fastest (Y. LeCun, http://yann.lecun.com/exdb/mnist/).

Rules: nothing is allocated before the size that the header declares was held against the size of the file.
"""

import gzip
import math
import struct
import zlib
from io import BufferedIOBase
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from worker.data.files import DEFLATE_MAX_RATIO, fill, opened, size_of
from worker.data.stored_array import StoredArray
from worker.errors import DataFault

TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
GZIP_MAGIC = b"\x1f\x8b"


class _Header(NamedTuple):
    stored: np.dtype[Any]
    shape: tuple[int, ...]
    header_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.header_bytes + math.prod(self.shape) * self.stored.itemsize


def read_idx(path: str) -> StoredArray:
    """The array of an idx file, in memory, in the file's type and the machine's byte order; DataFault if damaged."""
    file_bytes = size_of(path)
    with opened(path) as file:
        magic = file.read(2)
        file.seek(0)
        if magic == GZIP_MAGIC:
            return StoredArray(_read_compressed(path, file, file_bytes), path)
        if path.endswith(".gz"):
            raise DataFault(
                f"{path}: is named .gz but is not gzip (begins with {_hex(magic)}); fetch it again or rename it"
            )
        header = _read_header(path, file)
        if header.total_bytes != file_bytes:
            raise _wrong_size(path, header, f"the file has {file_bytes}")
        return StoredArray(_read_values(path, file, header), path)


def _read_compressed(path: str, file: BufferedIOBase, file_bytes: int) -> NDArray[Any]:
    try:
        with gzip.GzipFile(fileobj=file) as stream:
            header = _read_header(path, stream)
            if header.total_bytes > DEFLATE_MAX_RATIO * file_bytes:
                raise _wrong_size(path, header, f"a gzip file of {file_bytes} bytes cannot hold that")
            values = _read_values(path, stream, header)
            if stream.read(1):  # also reads, and so checks, the checksum at the end
                raise _wrong_size(path, header, "it unpacks to more")
            return values
    except EOFError:
        raise DataFault(f"{path}: the gzip stream breaks off after {file_bytes} bytes; fetch the file again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataFault(
            f"{path}: the gzip stream is damaged ({error}; {file_bytes} bytes); fetch the file again"
        ) from None


def _read_header(path: str, stream: BufferedIOBase) -> _Header:
    first = stream.read(4)
    if len(first) < 4:
        raise DataFault(
            f"{path}: ends after {len(first)} bytes, inside the 4 bytes an idx file begins with; fetch it again"
        )
    zeros, type_code, dimensions = struct.unpack(">HBB", first)
    if zeros != 0:
        raise DataFault(
            f"{path}: is not an idx file: begins with {_hex(first)} where 00 00 is due; "
            "name an idx file, or read this one as npz, npy or csv"
        )
    if type_code not in TYPES:
        known = ", ".join(f"0x{code:02x}" for code in TYPES)
        raise DataFault(f"{path}: idx type byte is 0x{type_code:02x}, known are {known}; fetch or write the file again")
    if not 1 <= dimensions <= 4:
        raise DataFault(
            f"{path}: idx header declares {dimensions} dimensions, 1 to 4 can be read; write the file again"
        )
    sizes = stream.read(4 * dimensions)
    if len(sizes) < 4 * dimensions:
        raise DataFault(
            f"{path}: ends after {4 + len(sizes)} bytes, inside the {4 + 4 * dimensions} bytes of its idx header; "
            "fetch it again"
        )
    shape = struct.unpack(f">{dimensions}I", sizes)
    return _Header(np.dtype(TYPES[type_code]), shape, 4 + 4 * dimensions)


def _read_values(path: str, stream: BufferedIOBase, header: _Header) -> NDArray[Any]:
    values = np.empty(header.shape, header.stored)
    filled = fill(values, stream)
    if filled < values.nbytes:
        raise _wrong_size(path, header, f"it ends after {header.header_bytes + filled}")
    return values.astype(header.stored.newbyteorder("="), copy=False)


def _wrong_size(path: str, header: _Header, found: str) -> DataFault:
    shape = " x ".join(map(str, header.shape))
    return DataFault(
        f"{path}: the idx header declares {shape} of {header.stored.newbyteorder('=')}, "
        f"{header.total_bytes} bytes in all, but {found}; fetch the file again"
    )


def _hex(data: bytes) -> str:
    return data.hex(" ")
