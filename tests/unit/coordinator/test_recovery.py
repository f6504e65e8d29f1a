"""Which lost launches are tried again, with histories made up."""

import re
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import coordinator
from coordinator import jobs
from coordinator.jobs import JobState, advance
from coordinator.recovery import PAUSES, RETRIED, after_loss, launch_time, recovery_seconds, restarts

PROCESSES = ("RankKilled", "rank 1 on here was killed by signal 9 (SIGKILL)")


@pytest.fixture(scope="session")
def launched(make_job, noon):
    """A job with so many retries, after launches of so many seconds each; the last one runs."""

    def make(retries: int, *ran_seconds: float, reported: bool = True, reason: str = PROCESSES[0]):
        job, now = make_job(), noon
        job.spec.limits.retries = retries
        job = advance(job, jobs.Admitted("digest"), now)
        for seconds in ran_seconds:
            if reported:
                job = advance(job, jobs.Reported(), now)
            now += timedelta(seconds=seconds)
            job = advance(job, jobs.Lost(reason, PROCESSES[1] + "; goes on from its newest checkpoint"), now)
            job = advance(job, jobs.Admitted("digest"), now)
        return job

    return make


def test_every_reason_a_launch_can_end_for_is_in_the_table() -> None:
    source = Path(coordinator.__file__).parent / "launchers" / "causes.py"
    named = set(re.findall(r'"((?:Rank|Ranks|Launch|Launcher|Host|Worker|Root|Not)[A-Z]\w+)"', source.read_text()))
    assert named
    assert named <= RETRIED.keys()


@pytest.mark.parametrize(
    ("reason", "message", "exit_code", "again"),
    [
        (*PROCESSES, 137, True),
        ("RankExited", "rank 1 exited with code 3 and said nothing", 3, True),
        ("RankExited", "rank 1 exited with code 2: usage", 2, False),
        ("LauncherKilled", "mpirun was killed by signal 9 (SIGKILL), and its ranks with it", None, True),
        ("RanksFailed", "step 7 (epoch 1): the loss is nan; lower the learning rate", 1, False),
        ("RankFailed", "rank 1 of 2 on here: x.npy: is damaged", 1, False),
        ("RankFailed", "rank 1 of 2 on here: gone in step 5 (epoch 1), exchange; killed by a signal", 1, True),
        ("RankFailed", "rank 1 of 2 on here: no progress for 60 s in step 5, exchange; the others wait", 1, True),
        ("WorkerMissing", "mpirun cannot run paceline-worker", 1, False),
        ("NoSummary", "the launcher ended well but left no summary.json", 0, False),
    ],
)  # fmt: skip
def test_a_lost_process_is_tried_again_and_a_fault_of_the_job_is_not(
    launched, reason, message, exit_code, again
) -> None:
    event = after_loss(launched(3), reason, message, exit_code)
    assert isinstance(event, jobs.Lost if again else jobs.Broke)
    assert event.reason == reason
    assert event.message.startswith(message)


def test_a_job_is_tried_again_as_often_as_its_limit_says_and_the_message_counts(launched) -> None:
    assert "(retry 2 of 2)" in after_loss(launched(2, 60), *PROCESSES).message
    ended = after_loss(launched(2, 60, 60), *PROCESSES)
    assert ended == jobs.Broke("RankKilled", PROCESSES[1] + "; launched 3 times, limits.retries is 2")
    assert after_loss(launched(0), *PROCESSES) == jobs.Broke(*PROCESSES)


def test_the_last_lines_of_the_log_stay_the_last_lines_of_the_message(launched) -> None:
    told = after_loss(launched(1), PROCESSES[0], PROCESSES[1] + "\nlast log lines:\n  step 4").message
    assert told == PROCESSES[1] + "; goes on from its newest checkpoint (retry 1 of 1)\nlast log lines:\n  step 4"


def test_what_fails_twice_in_the_same_way_before_its_first_step_is_not_tried_a_third_time(launched) -> None:
    event = after_loss(launched(9, 1, reported=False), *PROCESSES)
    assert isinstance(event, jobs.Broke)
    assert "twice in the same way before its first step" in event.message
    assert isinstance(after_loss(launched(9, 1, reported=False), "RankExited", "code 3", 3), jobs.Lost)
    assert isinstance(after_loss(launched(9, 1), *PROCESSES), jobs.Lost)


def test_a_coordinators_own_end_counts_against_nobody(launched, noon) -> None:
    job = launched(1, 1, 1, 1, reason="CoordinatorStopped")
    assert restarts(job) == 0
    assert isinstance(after_loss(job, *PROCESSES), jobs.Lost)
    again = advance(job, jobs.Lost("CoordinatorStopped", "stopped"), noon + timedelta(seconds=3))
    assert launch_time(again) == again.state_time


@given(st.lists(st.floats(0, 100), min_size=1, max_size=9))
def test_the_pause_grows_with_losses_one_soon_after_the_other(launched, noon, ran) -> None:
    job = launched(99, *ran)
    soon = len(ran) - max((place for place, seconds in enumerate(ran, start=1) if round(seconds, 6) > 10), default=0)
    job = advance(job, jobs.Lost(*PROCESSES), job.state_time + timedelta(seconds=1))
    pause = (launch_time(job) - job.state_time).total_seconds()
    assert pause == PAUSES[min(soon + 1, len(PAUSES) - 1)]


def test_the_first_loss_is_made_good_at_once(launched, noon) -> None:
    job = advance(launched(3), jobs.Lost(*PROCESSES), noon)
    assert job.state is JobState.RESTARTING
    assert launch_time(job) == noon
    job = advance(job, jobs.Admitted("digest"), noon + timedelta(seconds=1))
    assert recovery_seconds(job, noon + timedelta(seconds=2.5)) == 2.5
    assert recovery_seconds(launched(3), noon) is None


def test_a_stay_in_another_systems_queue_hides_no_second_failure_of_the_same_kind(launched, noon) -> None:
    job = launched(3, 1, reported=False)
    for reason in ("HeldForNodes", "Launching"):
        job = advance(job, jobs.Observed(reason, "Slurm says so"), noon)
    ended = after_loss(job, *PROCESSES)
    assert isinstance(ended, jobs.Broke)
    assert "twice in the same way before its first step" in ended.message
