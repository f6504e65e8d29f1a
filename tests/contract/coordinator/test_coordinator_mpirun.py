"""The real mpirun between the coordinator and the fake worker."""

import sys
from pathlib import Path

import pytest

from coordinator.launchers.local import LauncherMissing, find_mpirun
from protos import job_pb2


@pytest.fixture
def talk(serve_with, tmp_path: Path):
    try:
        mpirun = find_mpirun()
    except LauncherMissing as fault:
        pytest.skip(str(fault))
    worker = tmp_path / "worker"
    worker.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).parent / "fake_mpirun.py"}" worker "$@"\n')
    worker.chmod(0o755)
    return serve_with(mpirun=mpirun, worker=str(worker))


def test_a_rank_killed_under_mpirun_fails_the_job_naming_rank_signal_and_last_lines(talk) -> None:
    job = talk.until_ended(talk.submit("rank-killed", workers=2).id)
    assert (job.state, job.reason) == (job_pb2.JOB_STATE_FAILED, "RankKilled"), job.message
    assert "rank 1 on " in job.message
    assert "signal 9 (SIGKILL)" in job.message
    assert "training begins" in job.message


def test_ranks_under_mpirun_are_cancelled_and_leave_nothing(talk) -> None:
    job_id = talk.submit("long", workers=2).id
    talk.until_state(job_id, job_pb2.JOB_STATE_RUNNING)
    talk.cancel(job_id)
    assert talk.until_ended(job_id).state == job_pb2.JOB_STATE_CANCELLED
    left = [
        entry.name
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and f"PACELINE_JOB_ID={job_id}" in _environment_of(entry)
    ]
    assert left == []


def _environment_of(entry: Path) -> str:
    try:
        return (entry / "environ").read_text(errors="replace")
    except OSError:
        return ""
