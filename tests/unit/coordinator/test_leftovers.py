"""Ending what a killed coordinator left behind, with real processes."""

import os
import signal
import subprocess
import sys

import pytest

from coordinator.auth import Token, new_token
from coordinator.jobs import JobState, Process
from coordinator.leftovers import end_leftovers, identify
from protos import environment


@pytest.fixture
def start():
    """Starts a sleeping process that holds a token, and reaps it at the end."""
    started: list[subprocess.Popen[bytes]] = []

    def start(token: Token, code: str = "") -> subprocess.Popen[bytes]:
        program = f"import signal, time\n{code}\nprint('ready', flush=True)\ntime.sleep(600)"
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            env={**os.environ, environment.JOB_TOKEN: token.secret},
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait(10)
        process.stdout.close()


def test_a_process_is_known_by_its_pid_and_its_start() -> None:
    me = identify(os.getpid())
    assert me is not None
    assert me == identify(os.getpid())
    assert me.start_ticks > 0


def test_every_holder_of_the_jobs_token_is_ended_and_nobody_else(start, make_job) -> None:
    token = new_token()
    launcher, rank, stranger = start(token), start(token), start(new_token())
    job = make_job(state=JobState.STARTING, token_digest=token.digest)
    assert end_leftovers(job, grace_seconds=10) == 2
    assert (launcher.wait(10), rank.wait(10)) == (-signal.SIGTERM, -signal.SIGTERM)
    assert stranger.poll() is None


def test_one_that_ignores_the_kind_signal_is_killed(start, make_job) -> None:
    token = new_token()
    stubborn = start(token, "signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    assert end_leftovers(make_job(token_digest=token.digest), grace_seconds=0.1) == 1
    assert stubborn.wait(10) == -signal.SIGKILL


def test_a_pid_that_now_belongs_to_somebody_else_is_left_alone(start, make_job) -> None:
    stranger = start(new_token())
    there = identify(stranger.pid)
    assert there is not None
    earlier = Process(there.pid, there.start_ticks - 1)
    assert end_leftovers(make_job(process=earlier, token_digest="0"), grace_seconds=10) == 0
    assert stranger.poll() is None
    assert end_leftovers(make_job(process=there, token_digest="0"), grace_seconds=10) == 1
    assert stranger.wait(10) == -signal.SIGTERM
