"""Folders of parameter servers: a living owner's stays, a killed one's goes with the next, a removed one is gone."""

import os
import signal
import subprocess
import sys

from tests.mpi.mpirun import PROJECT
from worker.server.server_folder import ServerFolder

OWNER = """
import sys
from worker.server.server_folder import ServerFolder
folder = ServerFolder()
(folder.path / "shard.safetensors").write_bytes(b"1")
print(folder.path, flush=True)
sys.stdin.read()
"""


def test_the_folder_of_a_killed_owner_goes_when_the_next_is_made_and_a_living_ones_stays(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    env = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(PROJECT)}
    owners = [
        subprocess.Popen(
            [sys.executable, "-c", OWNER], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    folders = [owner.stdout.readline().strip() for owner in owners]
    try:
        owners[0].send_signal(signal.SIGKILL)
        owners[0].wait(60)
        assert all(map(os.path.isdir, folders))
        mine = ServerFolder()
        assert [os.path.isdir(folder) for folder in folders] == [False, True]
        mine.remove()
        assert [str(path) for path in tmp_path.iterdir()] == folders[1:]
    finally:
        for owner in owners:
            owner.kill()
            owner.communicate(timeout=60)


def test_what_is_not_readable_is_left_alone(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    other = tmp_path / "paceline-server-other"
    (other / "lock").mkdir(parents=True)  # cannot be opened for writing, as another user's cannot
    ServerFolder().remove()
    assert other.exists()
