"""A real text that Debian machines have: licences, and the copyright notes and changelogs of the installed packages.

Rules: files are read in sorted order, each once, whatever links lead to it; the text differs from machine to machine
and is the same for both sides. The last tenth is validated on and never trained on.
"""

import gzip
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

LICENCES = Path("/usr/share/common-licenses")
PACKAGES = Path("/usr/share/doc")
HELD_OUT = 10  # one byte of so many
MOST_BYTES = 4_000_000


class Split(NamedTuple):
    """A text for a language model, cut in two."""

    training: bytes
    validation: bytes


def list_texts(licences: Path = LICENCES, packages: Path = PACKAGES) -> list[Path]:
    """Licences, then what each package says of itself."""
    notes = [path for pattern in ("copyright", "changelog*") for path in packages.glob(f"*/{pattern}")]
    return sorted(licences.glob("*")) + sorted(notes)


def join_texts(paths: Iterable[Path], most_bytes: int) -> bytes:
    """The first `most_bytes` of all of them together, decompressed."""
    joined = bytearray()
    for path in _each_once(paths):
        joined += read_text(path)
        if len(joined) >= most_bytes:
            break
    return bytes(joined[:most_bytes])


def read_text(path: Path) -> bytes:
    """Plain or gzip-compressed; empty where the file is damaged or may not be read."""
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error):
        return b""


def _each_once(paths: Iterable[Path]) -> Iterator[Path]:
    seen: set[Path] = set()
    for path in paths:
        file = path.resolve()
        if file not in seen and file.is_file():
            seen.add(file)
            yield path


def bytes_for(samples: int, context: int) -> int:
    """How long a text has to be for so many samples to train on, each `context` bytes and all with a byte behind."""
    return min(-(-(samples * context + 1) * HELD_OUT // (HELD_OUT - 1)), MOST_BYTES)


def split(text: bytes, context: int, batch_size: int) -> Split:
    """The last tenth, and of what is before it as many whole batches as there are.

    ValueError for a text that holds no batch to train on, or no sample to validate on.
    """
    bound = len(text) - len(text) // HELD_OUT
    samples = max(bound - 1, 0) // context // batch_size * batch_size
    if samples == 0 or len(text) - bound <= context:
        raise ValueError(f"a text of {len(text)} bytes is too short for a batch of {batch_size} x {context}")
    return Split(text[: samples * context + 1], text[bound:])
