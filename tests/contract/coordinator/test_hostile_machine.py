"""What a machine can do to a coordinator: a store that is none, folders in the way, a clock that jumps.

Each row is a fault and its one outcome, on a state folder of its own. A disk that is full or cannot be written, and one
damaged page of the store, are rows of test_coordinator_disk.py. The table is printed as test_hostile_requests.py says.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from coordinator.launchers import local
from coordinator.serve import CannotServe, read_settings, running
from protos import coordinator_pb2 as pb
from protos import job_pb2


def cut_short(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    path.write_bytes(path.read_bytes()[: 3 * 4096 + 100])


def written_by_a_later_version(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")


def another_programs(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE jobs (id)")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


STORES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a store that is text": (lambda path: path.write_text("jobs, in order:\n" * 1000), "file is not a database"),
    "a store of zeros": (lambda path: path.write_bytes(bytes(8192)), "file is not a database"),
    "a store cut short": (cut_short, "database disk image is malformed"),
    "a store of a later version": (written_by_a_later_version, "was written by another version of paceline"),
    "another program's store": (another_programs, "holds a table `jobs` that is not paceline's"),
    "a folder for a store": (a_folder, "unable to open database file"),
}  # fmt: skip


@pytest.mark.parametrize("row", STORES)
def test_a_hostile_store_is_one_line_at_the_start_and_is_left_as_it_is(settings, row: str) -> None:
    spoil, words = STORES[row]
    with running(settings):
        pass
    path = settings.state / "paceline.sqlite"
    spoil(path)
    before = path.read_bytes() if path.is_file() else b""
    began = time.monotonic()
    with pytest.raises(CannotServe) as fault, running(settings):
        pass
    print(f"row store: {row} {time.monotonic() - began:5.2f} s  {fault.value}")
    assert words in str(fault.value)
    assert str(path) in str(fault.value)
    assert "\n" not in str(fault.value)
    assert (path.read_bytes() if path.is_file() else b"") == before


def test_a_hostile_folder_where_a_jobs_files_go_fails_that_job_alone(serve_with) -> None:
    talk = serve_with()
    jobs = talk.coordinator.settings.state / "jobs"
    good = talk.until_ended(talk.submit("good").id)
    jobs.rename(jobs.with_name("moved"))
    jobs.write_text("")
    failed = talk.until_ended(talk.submit("good").id)
    print(f"row machine: a file where jobs' folders go  {failed.reason}: {failed.message}")
    assert (failed.state, failed.reason) == (job_pb2.JOB_STATE_FAILED, "LaunchFailed")
    assert "Not a directory" in failed.message or "File exists" in failed.message
    jobs.unlink()
    jobs.with_name("moved").rename(jobs)
    assert talk.until_ended(talk.submit("good").id).state == good.state == job_pb2.JOB_STATE_SUCCEEDED


def test_a_hostile_folder_where_the_audit_log_goes_is_told_and_holds_up_nobody(serve_with, settings, caplog) -> None:
    (settings.state / "audit.jsonl").mkdir(parents=True)
    talk = serve_with()
    assert talk.until_ended(talk.submit("good").id).state == job_pb2.JOB_STATE_SUCCEEDED
    lines = [line.getMessage() for line in caplog.records if line.name == "paceline.audit"]
    print(f"row machine: a folder where the audit log goes  {lines[0]}")
    assert "cannot be written: Is a directory; missing: " in lines[0]
    assert "SubmitJob" in lines[0]


def test_a_hostile_link_where_the_audit_log_goes_is_not_followed(serve_with, settings, tmp_path, caplog) -> None:
    settings.state.mkdir()
    (tmp_path / "precious").write_text("precious")
    (settings.state / "audit.jsonl").symlink_to(tmp_path / "precious")
    talk = serve_with()
    talk.submit("good", validate_only=True)
    assert (tmp_path / "precious").read_text() == "precious"
    print(f"row machine: a link where the audit log goes  {caplog.records[-1].getMessage()}")


@pytest.mark.parametrize("missing", ["mpirun", "paceline-worker"])
def test_a_hostile_machine_without_a_program_is_told_at_the_start(monkeypatch, tmp_path, missing: str) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    found = {"mpirun": local.find_mpirun, "paceline-worker": local.find_worker}
    for name, function in found.items():
        replacement = function if name == missing else lambda name=name: f"/bin/{name}"
        monkeypatch.setattr(local, function.__name__, replacement)
    with pytest.raises(CannotServe) as fault:
        read_settings("127.0.0.1:0", "127.0.0.1:0", tmp_path, [], 1)
    print(f"row machine: {missing} is missing  {fault.value}")
    assert str(fault.value).startswith(f"{missing} is neither in ")
    assert "install" in str(fault.value)


@pytest.mark.parametrize("jump", [timedelta(days=365), timedelta(hours=-1), timedelta(days=-20_000)], ids=str)
def test_a_hostile_clock_that_jumps_ends_no_job_and_holds_up_none(serve_with, monkeypatch, jump: timedelta) -> None:
    shift = [timedelta()]
    monkeypatch.setattr("coordinator.serve._now", lambda: datetime.now(UTC) + shift[0])
    talk = serve_with()
    spec = talk.spec("patient")
    spec.limits.seconds = 3600
    request = pb.SubmitJobRequest(spec=spec)
    running_id = talk.stub.SubmitJob(request, timeout=20).job.id
    talk.until_state(running_id, job_pb2.JOB_STATE_RUNNING)
    lost = talk.submit("killed", retries=1)
    began = time.monotonic()
    shift[0] = jump
    ended = talk.until_ended(lost.id)
    assert ended.attempt == 2  # the restart came, and no hour later
    logs = talk.coordinator.settings.state / "jobs" / running_id / "logs"
    (logs / "go-on").touch()
    job = talk.until_ended(running_id)
    print(f"row machine: the clock jumps by {jump} {time.monotonic() - began:5.2f} s  jobs end and restart as ever")
    assert job.state == job_pb2.JOB_STATE_SUCCEEDED, job.message
    for told in (job, ended):
        times = [change.time.ToNanoseconds() for change in told.history]
        assert times == sorted(times)
