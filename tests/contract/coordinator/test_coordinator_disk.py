"""A disk that is full, cannot be written or holds damaged bytes: one plain line, and no acknowledged job is lost."""

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import grpc
import pytest
import sqlalchemy as sa
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from coordinator.serve import CannotServe, running
from protos import coordinator_pb2 as pb
from protos import job_pb2

PAGES = 40  # of 4096 bytes: room for the tables and a few jobs


@contextmanager
def small_disk() -> Iterator[None]:
    """SQLite takes a file of so many pages for one on a full disk; so do connections opened meanwhile."""

    def limit(connection: sqlite3.Connection, _record: object) -> None:
        connection.execute(f"PRAGMA max_page_count = {PAGES}").close()

    sa.event.listen(sa.Engine, "connect", limit)
    try:
        yield
    finally:
        sa.event.remove(sa.Engine, "connect", limit)


def test_a_full_disk_refuses_in_one_line_and_with_room_again_everything_acknowledged_goes_on(serve_with) -> None:
    with small_disk():
        talk = serve_with()
        acknowledged = [talk.submit("long", workers=2).id]
        talk.until_state(acknowledged[0], job_pb2.JOB_STATE_RUNNING)

        def fill() -> None:
            for number in range(2000):
                acknowledged.append(talk.submit("short", request_id=f"{number} {'x' * 100}").id)

        with pytest.raises(grpc.RpcError) as error:
            fill()
    status = rpc_status.from_call(error.value)
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.reason == "StoreUnavailable"
    assert status.message == (
        f"the job store {talk.coordinator.settings.state}/paceline.sqlite cannot be used now: "
        "database or disk is full: make room on its disk; ask again when it is back"
    )
    listed = [job.id for job in talk.stub.ListJobs(pb.ListJobsRequest(page_size=1000), timeout=20).jobs]
    assert listed == acknowledged[::-1]
    talk.cancel(acknowledged[0])
    assert talk.until_ended(acknowledged[-1]).state == job_pb2.JOB_STATE_SUCCEEDED


def test_a_damaged_file_is_one_line_at_the_start_and_is_left_as_it_is(settings) -> None:
    with running(settings):
        pass
    path = settings.state / "paceline.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (root,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'jobs'").fetchone()
    content = bytearray(path.read_bytes())
    content[(root - 1) * 4096 : root * 4096] = b"\xff" * 4096
    path.write_bytes(content)
    with pytest.raises(CannotServe) as fault, running(settings):
        pass
    assert str(fault.value) == (
        f"the job store {path} cannot be used now: database disk image is malformed: "
        "bring it back from a backup, or move it away to begin without these jobs"
    )
    with closing(sqlite3.connect(path)) as connection, pytest.raises(sqlite3.DatabaseError, match="malformed"):
        connection.execute("SELECT * FROM jobs").fetchall()


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root and unshare of util-linux")
def test_a_state_folder_that_cannot_be_written_is_one_line(settings, fake_mpirun) -> None:
    with running(settings):
        pass
    state = str(settings.state)
    script = Path(__file__).parent / "serve_fake.py"
    serve = (sys.executable, str(script), fake_mpirun, "127.0.0.1:0", "127.0.0.1:0", state)
    read_only = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && echo mounted && exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", read_only, state, *serve], capture_output=True, text=True, timeout=60, check=False
    )
    if done.stdout != "mounted\n":
        pytest.skip(f"this machine lets nobody mount: {done.stderr.strip()}")
    assert done.stderr == f"error: --state: cannot use {state}: Read-only file system\n"
    assert done.returncode == 1
