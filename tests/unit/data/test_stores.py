"""Data files named by URLs: fetched once, read like any other file, and every fault one line about the URL."""

import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from protos import job_pb2
from tests.unit.data.store_server import BUCKET, served
from worker.data import stores
from worker.data.sources import open_source
from worker.data.stores import PIECE_BYTES, cache_folder, fetch_all, local_path
from worker.errors import DataFault

fsspec = pytest.importorskip("fsspec", reason="no fsspec: pip install 'paceline[stores]'")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    folder = tmp_path / "remote"
    folder.mkdir()
    np.save(folder / "x.npy", np.arange(12.0).reshape(6, 2))
    np.save(folder / "y.npy", np.arange(6))
    return folder


@pytest.fixture
def s3(remote: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    pytest.importorskip("s3fs", reason="no s3fs: pip install 'paceline[stores]'")
    with served(remote) as (endpoint, requests):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-word")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield requests


def npy(prefix: str) -> job_pb2.Source:
    return job_pb2.Source(npy=job_pb2.NpySource(features=f"{prefix}/x.npy", targets=f"{prefix}/y.npy"))


def files_under(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.name != "lock")


def test_a_path_is_left_alone() -> None:
    for path in ("/data/x.npy", "x.npy", "a:b", "s3:/bucket/x", "simplecache::s3://bucket/x"):
        assert local_path(path) == path


def test_an_s3_object_is_fetched_once_and_memory_mapped(s3: list[str], remote: Path, cache: Path) -> None:
    dataset = open_source(npy(f"s3://{BUCKET}"), "labels")
    np.testing.assert_array_equal(dataset.features, np.load(remote / "x.npy"))
    np.testing.assert_array_equal(dataset.targets, np.arange(6))
    assert not dataset.features.flags.owndata
    assert dataset.place == f"s3://{BUCKET}/x.npy with s3://{BUCKET}/y.npy"
    fetched = [request for request in s3 if request.startswith("GET") and ".npy" in request]
    assert len(fetched) == 2
    open_source(npy(f"s3://{BUCKET}"), "labels")
    assert [request for request in s3 if request.startswith("GET") and ".npy" in request] == fetched
    assert files_under(cache) == ["x.npy", "y.npy"]


def test_a_changed_object_is_fetched_anew(s3: list[str], remote: Path) -> None:
    first = open_source(npy(f"s3://{BUCKET}"), "labels")
    np.save(remote / "x.npy", -np.arange(12.0).reshape(6, 2))
    second = open_source(npy(f"s3://{BUCKET}"), "labels")
    np.testing.assert_array_equal(second.features, -first.features)


@pytest.fixture
def web(remote: Path) -> Iterator[str]:
    """A web server that knows no ranges and gives no ETag: Python's own."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(remote))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_web_server_without_ranges_gives_a_large_file_and_its_changes(web: str, remote: Path, cache: Path) -> None:
    for value, changed_at in ((1, 1_000_000_000), (2, 1_000_000_100)):
        np.save(remote / "large.npy", np.full(2 * PIECE_BYTES, value, np.uint8))
        os.utime(remote / "large.npy", (changed_at, changed_at))
        np.testing.assert_array_equal(np.load(local_path(f"{web}/large.npy")), value)


def test_a_web_server_that_is_not_there_is_not_called_a_missing_file(web: str, cache: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        with pytest.raises(DataFault, match=r"cannot be fetched: ClientConnectorError: .*check the URL, the network"):
            local_path(f"http://127.0.0.1:{taken.getsockname()[1]}/x.npy")
    with pytest.raises(DataFault, match="no such file in the store"):
        local_path(f"{web}/none.npy")


def test_an_object_that_is_not_there_is_one_line_and_nothing_is_kept(s3: list[str], cache: Path) -> None:
    with pytest.raises(DataFault) as caught:
        local_path(f"s3://{BUCKET}/none.npy")
    assert str(caught.value) == f"s3://{BUCKET}/none.npy: no such file in the store; check the URL in the job file"
    assert files_under(cache) == []


def test_a_fault_of_the_file_names_the_url(s3: list[str], remote: Path) -> None:
    (remote / "x.npy").write_bytes(b"no array at all")
    with pytest.raises(DataFault) as caught:
        open_source(npy(f"s3://{BUCKET}"), "labels")
    assert str(caught.value).startswith(f"s3://{BUCKET}/x.npy: is not an npy file")


def test_all_urls_of_a_job_are_fetched(remote: Path, cache: Path) -> None:
    job = job_pb2.JobSpec(initialize_from=f"file://{remote}/y.npy", labels={"team": "vision"})
    job.data.train.CopyFrom(npy(f"file://{remote}"))
    fetch_all(job, lambda: None)
    assert files_under(cache) == ["x.npy", "y.npy"]


def test_processes_that_want_the_same_file_fetch_it_once(remote: Path, cache: Path) -> None:
    (remote / "large").write_bytes(bytes(30_000_000))
    code = f"from worker.data.stores import local_path; print(local_path('file://{remote}/large'))"

    def run(_: int) -> str:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
        return done.stdout.strip()

    with ThreadPoolExecutor(3) as pool:
        (path,) = set(pool.map(run, range(3)))
    assert Path(path).read_bytes() == (remote / "large").read_bytes()
    assert files_under(cache) == ["large"]


def test_a_store_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    pytest.importorskip("s3fs", reason="no s3fs: pip install 'paceline[stores]'")
    with socket.create_server(("127.0.0.1", 0)) as mute:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{mute.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-word")
        with pytest.raises(DataFault, match=r"s3://bucket/x: the store said nothing for 1 s; check the address"):
            local_path("s3://bucket/x", silence_seconds=1)
    assert files_under(cache) == []


def test_a_fetch_that_breaks_off_leaves_nothing_half_written(
    remote: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.local import LocalFileOpener

    def breaks(self: LocalFileOpener, size: int = -1) -> bytes:
        raise ConnectionResetError(f"the peer of file://someone:secret-word@host/{size} is gone")

    monkeypatch.setattr(LocalFileOpener, "read", breaks, raising=False)
    with pytest.raises(DataFault, match=r"x\.npy: cannot be fetched: ConnectionResetError: the peer"):
        local_path(f"file://{remote}/x.npy")
    assert files_under(cache) == []
    monkeypatch.undo()


def test_without_the_extra_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(stores, "import_module", missing)
    with pytest.raises(DataFault) as caught:
        local_path("s3://bucket/x.npy")
    assert "No module named 'fsspec'" in str(caught.value)
    assert "pip install 'paceline[stores]'" in str(caught.value)


def test_credentials_in_a_url_are_refused_and_not_repeated() -> None:
    with pytest.raises(DataFault) as caught:
        local_path("https://someone:secret-word@host/x.npy?signature=secret-sign")
    assert str(caught.value).startswith("https://host/x.npy: holds a user or password; give credentials by the env")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["nothing://bucket/x", "file:///not/there/x"])
def test_an_unknown_store_or_file_is_one_line(url: str) -> None:
    with pytest.raises(DataFault) as caught:
        local_path(url)
    assert str(caught.value).startswith(f"{url}: ")
    assert "\n" not in str(caught.value)


def test_a_cache_that_cannot_be_written_is_one_line(remote: Path, cache: Path) -> None:
    cache.write_text("a file where a folder is due")
    with pytest.raises(DataFault, match=r"x\.npy: cannot be kept in the cache .*: Not a directory; make room, or name"):
        local_path(f"file://{remote}/x.npy")


def test_a_full_disk_is_one_line_and_leaves_nothing(remote: Path, cache: Path) -> None:
    (remote / "large").write_bytes(bytes(2_000_000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(DataFault, match=r"large: cannot be kept in the cache .*: File too large; make room"):
            local_path(f"file://{remote}/large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert files_under(cache) == []


def test_the_cache_is_where_it_is_asked_to_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PACELINE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "paceline"
