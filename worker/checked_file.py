"""A safetensors file that shows whether it is whole: its metadata holds the SHA-256 of all the rest.

Rules: any safetensors library opens it. The digest is that of the whole file with zeros in the digest's own place, so
that a bit changed anywhere is found. Neither writing nor checking holds Python's lock for long, which both do in a
thread beside training; the library's own writer copies all tensors first and holds it meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np

DIGEST: Final = "sha256"
NO_DIGEST: Final = "0" * 64
DIGEST_FIELD = re.compile(rb'"sha256":"([0-9a-f]{64})"')  # within other metadata its quotes would be escaped
DTYPES: Final = {"<f4": "F32", "<f8": "F64"}
MOST_HEADER_BYTES: Final = 100_000_000  # the library's own limit
BLOCK_BYTES: Final = 1 << 20


def write_checked(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write a file straight from C-contiguous float32 or float64 arrays. OSError where the disk refuses."""
    header = _header(tensors, {**metadata, DIGEST: NO_DIGEST})
    place = _digests(header)[0].start(1)
    digest = hashlib.sha256(header)
    with path.open("wb", buffering=0) as file:
        _write_all(file, header)
        for array in tensors.values():
            for block in _blocks(array):
                digest.update(block)
                _write_all(file, block)
        file.seek(place)
        _write_all(file, digest.hexdigest().encode())


def damage(path: Path) -> str | None:
    """What is wrong with a file that `write_checked` wrote; None where every bit is as it was. OSError as of open."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= MOST_HEADER_BYTES:
            return "it does not begin as a safetensors file does"
        file.seek(0)
        header = file.read(8 + length)
        found = _digests(header)
        if len(found) != 1:
            return f"it holds no {DIGEST}"
        start, stop = found[0].span(1)
        digest = hashlib.sha256(header[:start] + NO_DIGEST.encode() + header[stop:])
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return None if digest.hexdigest().encode() == found[0][1] else f"its {DIGEST} does not match what it holds"


def _digests(header: bytes) -> list[re.Match[bytes]]:
    return list(DIGEST_FIELD.finditer(header))


def _header(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for name, array in tensors.items():
        end = position + array.nbytes
        entries[name] = {
            "dtype": DTYPES[array.dtype.str], "shape": list(array.shape), "data_offsets": [position, end]
        }  # fmt: skip
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _blocks(array: np.ndarray) -> Iterator[memoryview]:
    data = array.reshape(-1).view(np.uint8).data
    for start in range(0, len(data), BLOCK_BYTES):
        yield data[start : start + BLOCK_BYTES]


def _write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """An unbuffered write may take a part, as one does that meets a limit; the next one says why."""
    rest = memoryview(data)
    while len(rest):
        rest = rest[file.write(rest) :]
