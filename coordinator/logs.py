"""Reads and follows the log files of a job: `launcher.log`, and `rank-N.log` for each rank.

Rules: a line is sent once and whole, or as far as it went when the job ended; a line longer than LINE_BYTES comes in
pieces; bytes that are not UTF-8 are shown as such, never a reason to stop. The files grow while they are read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

LINE_BYTES = 64 * 1024
_BLOCK_BYTES = 256 * 1024
_NAME = re.compile(r"(launcher|rank-(\d{1,6}))\.log")


class LogLine(NamedTuple):
    source: str  # `launcher`, or `rank-N`
    line: str  # without its line end


@dataclass
class _Cursor:
    """How far a file was read."""

    path: Path
    offset: int = 0
    rest: bytes = b""  # the start of a line whose end is not written yet

    def read(self, to_the_end: bool) -> Iterator[str]:
        """Every whole line since last time; `to_the_end` also gives a last line that has no end."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            while block := file.read(_BLOCK_BYTES):
                self.offset += len(block)
                *lines, self.rest = (self.rest + block).split(b"\n")
                for line in lines:
                    yield from _pieces(line)
                while len(self.rest) > LINE_BYTES:
                    piece, self.rest = self.rest[:LINE_BYTES], self.rest[LINE_BYTES:]
                    yield _text(piece)
        if to_the_end and self.rest:
            yield _text(self.rest)
            self.rest = b""


def read_logs(log_dir: Path, rank: int | None) -> Iterator[LogLine]:
    """Every line there is: the launcher's first, then rank by rank; with `rank` that rank's alone."""
    return follow_logs(log_dir, rank, ended=lambda: True, pause=lambda: False)


def follow_logs(
    log_dir: Path, rank: int | None, ended: Callable[[], bool], pause: Callable[[], bool]
) -> Iterator[LogLine]:
    """Every line there is and will be, until `ended` and all is read.

    `pause` waits a little for more and returns False when nobody listens any more.
    """
    cursors: dict[str, _Cursor] = {}
    while True:
        last = ended()  # asked before reading: what is written before the end is read after it
        for source in _sources(log_dir, rank):
            cursor = cursors.setdefault(source, _Cursor(log_dir / f"{source}.log"))
            for line in cursor.read(to_the_end=last):
                yield LogLine(source, line)
        if last or not pause():
            return


def _sources(log_dir: Path, rank: int | None) -> list[str]:
    """The logs there are by now, the launcher's first; a link is not followed."""
    if not log_dir.is_dir():
        return []
    found: list[tuple[int, str]] = []
    for path in log_dir.iterdir():
        match = _NAME.fullmatch(path.name)
        if match is None or path.is_symlink() or not path.is_file():
            continue
        number = -1 if match[2] is None else int(match[2])
        if rank is None or number == rank:
            found.append((number, path.stem))
    return [name for _, name in sorted(found)]


def _pieces(line: bytes) -> Iterator[str]:
    if len(line) <= LINE_BYTES:
        yield _text(line)
        return
    for start in range(0, len(line), LINE_BYTES):
        yield _text(line[start : start + LINE_BYTES])


def _text(line: bytes) -> str:
    return line.removesuffix(b"\r").decode("utf-8", errors="backslashreplace")
