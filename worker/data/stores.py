"""Data files named by a URL (`s3://bucket/key`): fetched once into this machine's cache, then read like any other file.

Rules: fsspec, an extra, is imported here alone and only when a job names a URL. What a file of the cache is called
follows from the URL and from what the store says of that version, so a changed object is fetched anew. A file appears
under its name only when it is whole. One process of a machine fetches, the others wait for its lock; every wait has a
deadline. Credentials are those of the environment; none is in a message.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

from google.protobuf.message import Message

from protos import job_pb2
from protos.labels import is_map
from protos.rules import rule_of
from protos.urls import holds_credentials, is_url, shown
from worker.data.confinement import check_url
from worker.errors import DataFault

CACHE = "PACELINE_CACHE"  # environment variable: a folder
SILENCE_SECONDS = 30.0  # without a byte or an answer; below the watchdog's limit, so that the better message comes
PIECE_BYTES = 1 << 22
LOCK_POLL_SECONDS = 0.1


def no_report() -> None:
    """Nobody wants to know."""


def local_path(
    text: str,
    cache: Path | None = None,
    silence_seconds: float = SILENCE_SECONDS,
    progress: Callable[[], None] = no_report,
) -> str:
    """The path itself; for a URL, that of its file in the cache, fetched now unless it is there.

    DataFault when the store cannot be reached, says no, or says nothing for `silence_seconds`;
    `progress` is called while bytes arrive.
    """
    if not is_url(text):
        return text
    check_url(text)
    place = shown(text)
    if holds_credentials(text):
        raise DataFault(f"{place}: holds a user or password; give credentials by the environment, not in the job file")
    fetch = _Fetch(text, place, silence_seconds, progress)
    fetch.run(fetch.look)
    folder = (cache or cache_folder()) / "files" / hashlib.sha256(f"{text}\n{fetch.version}".encode()).hexdigest()[:32]
    path = folder / (PurePosixPath(place).name or "file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with _locked(folder / "lock", place, path.exists, silence_seconds, progress):
                if not path.exists():
                    temporary = path.with_name(f"partial-{os.getpid()}")
                    try:
                        fetch.run(lambda: fetch.copy(temporary))
                        temporary.replace(path)
                    finally:
                        temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _not_kept(place, folder, error) from error
    return str(path)


def fetch_all(message: Message, progress: Callable[[], None]) -> None:
    """Have every URL of a job in the cache; DataFault for the first that cannot be had."""
    for field, value in message.ListFields():
        if field.message_type is not None and not is_map(field):
            for part in value if field.is_repeated else [value]:
                fetch_all(part, progress)
        elif rule_of(field).path and is_url(value):
            local_path(value, progress=progress)


def localized(source: job_pb2.Source) -> tuple[job_pb2.Source, dict[str, str]]:
    """The source with every URL replaced by its file in the cache, fetched now; and file -> URL, for messages."""
    local, urls = job_pb2.Source(), {}
    local.CopyFrom(source)
    kind = source.WhichOneof("kind")
    options = getattr(local, kind) if kind else None
    for field, text in options.ListFields() if isinstance(options, Message) else ():
        if rule_of(field).path and is_url(text):
            path = local_path(text)
            setattr(options, field.name, path)
            urls[path] = shown(text)
    return local, urls


def with_urls(message: str, urls: dict[str, str]) -> str:
    """A message that names what the job file names."""
    for path, url in urls.items():
        message = message.replace(path, url)
    return message


def cache_folder() -> Path:
    """PACELINE_CACHE, or `paceline` in the user's cache folder (XDG base directories)."""
    if named := os.environ.get(CACHE):
        return Path(named).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paceline"


class _Fetch:
    """What one URL's store is asked, in a thread that may hang without the job hanging with it."""

    def __init__(self, url: str, place: str, silence_seconds: float, progress: Callable[[], None]) -> None:
        self._url, self._place, self._silence_seconds, self._progress = url, place, silence_seconds, progress
        self._last_sign = time.monotonic()
        self._abandoned = False
        self._store: Any = None
        self.version = ""

    def look(self) -> None:
        """Find the version of the file; fsspec's word for it is ukey."""
        scheme = self._url.partition("://")[0].lower()
        # skip_instance_cache: one URL's store is never that of another, with another's settings.
        self._store = import_module("fsspec").filesystem(scheme, skip_instance_cache=True)
        information = self._store.info(self._url)
        if information.get("type") == "directory":
            raise IsADirectoryError("is a folder, not a file")
        facts = [information.get(name) for name in ("ETag", "etag", "LastModified", "Last-Modified", "mtime", "size")]
        self.version = f"{facts}"

    def copy(self, path: Path) -> None:
        """Write the file's bytes to `path`."""
        # 0 is fsspec's word for reading a web server's answer as it comes: not every one knows ranges.
        block_size = 0 if self._url.lower().startswith(("http://", "https://")) else PIECE_BYTES
        with path.open("xb", buffering=0) as file, self._store.open(self._url, "rb", block_size=block_size) as remote:
            while not self._abandoned and (piece := remote.read(PIECE_BYTES)):
                try:
                    left = memoryview(piece)
                    while left:
                        left = left[file.write(left) :]
                except OSError as error:
                    raise _not_kept(self._place, path.parent, error) from error
                self._last_sign = time.monotonic()

    def run(self, act: Callable[[], None]) -> None:
        """Do it in a thread; DataFault when it fails or gives no sign of life in time."""
        failure: list[BaseException] = []

        def guarded() -> None:
            try:
                act()
            except BaseException as error:  # whatever a store's library raises is the caller's to name
                failure.append(error)

        self._last_sign = time.monotonic()
        thread = threading.Thread(target=guarded, name="fetch", daemon=True)
        thread.start()
        while thread.is_alive():
            seen = self._last_sign
            left = seen + self._silence_seconds - time.monotonic()
            if left <= 0:
                self._abandoned = True
                raise DataFault(
                    f"{self._place}: the store said nothing for {self._silence_seconds:g} s; "
                    "check the address and the network"
                )
            thread.join(min(left, 1.0))
            if self._last_sign != seen:
                self._progress()
        if failure:
            raise self._named(failure[0]) from failure[0]

    def _named(self, error: BaseException) -> DataFault:
        if isinstance(error, DataFault):
            return error
        if isinstance(error, ImportError):
            return DataFault(
                f"{self._place}: a URL is read by fsspec and the library of its store, which cannot be imported "
                f"({_first_line(error, self._url)}); pip install 'paceline[stores]', or the library that is named"
            )
        # fsspec says "not found" of a web server that cannot be reached, too; its cause tells them apart.
        if isinstance(error, FileNotFoundError) and not isinstance(error.__cause__, OSError):
            return DataFault(f"{self._place}: no such file in the store; check the URL in the job file")
        if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
            error = error.__cause__
        return DataFault(
            f"{self._place}: cannot be fetched: {type(error).__name__}: {_first_line(error, self._url)}; "
            "check the URL, the network and the credentials in the environment"
        )


@contextmanager
def _locked(
    path: Path, place: str, done: Callable[[], bool], deadline_seconds: float, progress: Callable[[], None]
) -> Iterator[None]:
    """Hold the lock; the kernel lets it go with its process. Waiting is for as long as the holder's file grows."""
    with path.open("ab") as file:
        seen, since = -1, time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if done():
                    break
                grown = sum(partial.stat().st_size for partial in path.parent.glob("partial-*") if partial.exists())
                if grown != seen:
                    seen, since = grown, time.monotonic()
                    progress()
                # The holder gives up after the same silence; a second of grace lets its word be the first.
                if time.monotonic() - since > deadline_seconds + 1:
                    raise DataFault(
                        f"{place}: another process has been fetching it for {deadline_seconds:g} s without progress; "
                        "end that one and start again"
                    ) from None
                time.sleep(LOCK_POLL_SECONDS)
        yield


def _not_kept(place: str, folder: Path, error: OSError) -> DataFault:
    return DataFault(
        f"{place}: cannot be kept in the cache {folder}: {error.strerror or error}; "
        f"make room, or name another folder by {CACHE}"
    )


def _first_line(error: BaseException, url: str) -> str:
    return (str(error).partition("\n")[0] or type(error).__name__).replace(url, shown(url))
