"""Who starts and who waits, with invented jobs and times."""

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.jobs import LAUNCHED, JobState
from coordinator.scheduler import Capacity, GiveUp, Start, Wait, decide

SITUATION = st.lists(st.tuples(st.sampled_from(JobState), st.integers(1, 9)), max_size=12)


@pytest.fixture(scope="session")
def queue(make_job):
    """Jobs in the order of submission from (state, workers) pairs."""

    def make(*situation):
        return [make_job(f"job-{number}", state, workers) for number, (state, workers) in enumerate(situation)]

    return make


@given(SITUATION, st.integers(1, 8))
def test_slots_in_use_never_exceed_those_there_are(queue, noon, situation, slots) -> None:
    jobs = queue(*situation)
    used = sum(job.slots for job in jobs if job.state in LAUNCHED)
    started = {action.job_id for action in decide(noon, jobs, Capacity(slots, 60)) if isinstance(action, Start)}
    granted = sum(job.slots for job in jobs if job.id in started)
    assert granted == 0 or used + granted <= slots


@given(SITUATION, st.integers(1, 8))
def test_each_queued_job_starts_or_waits_with_a_reason_and_no_other_job_is_touched(
    queue, noon, situation, slots
) -> None:
    jobs = queue(*situation)
    actions = decide(noon, jobs, Capacity(slots, 60))
    assert sorted(action.job_id for action in actions) == sorted(
        job.id for job in jobs if job.state is JobState.QUEUED
    )
    waits = [action for action in actions if isinstance(action, Wait)]
    assert all(wait.message and wait.reason for wait in waits)
    assert [wait.queue_position for wait in waits] == list(range(1, len(waits) + 1))


@given(SITUATION, st.integers(1, 8))
def test_no_job_overtakes_another_that_fits(queue, noon, situation, slots) -> None:
    jobs = queue(*situation)
    fitting = [job.id for job in jobs if job.state is JobState.QUEUED and job.slots <= slots]
    actions = [action for action in decide(noon, jobs, Capacity(slots, 60)) if action.job_id in fitting]
    assert [action.job_id for action in actions] == fitting
    kinds = [isinstance(action, Start) for action in actions]
    assert kinds == sorted(kinds, reverse=True)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=8), st.integers(4, 8))
def test_a_queue_that_fits_is_served_to_the_last_job(queue, noon, sizes, slots) -> None:
    left = queue(*((JobState.QUEUED, workers) for workers in sizes))
    served = []
    while left:
        started = [action.job_id for action in decide(noon, left, Capacity(slots, 60)) if isinstance(action, Start)]
        assert started, "jobs wait although nothing runs"
        served += started
        left = [job for job in left if job.id not in started]
    assert served == [f"job-{number}" for number in range(len(sizes))]


def test_a_waiting_job_says_what_it_needs_and_who_is_ahead(queue, noon) -> None:
    jobs = queue((JobState.RUNNING, 3), (JobState.QUEUED, 4), (JobState.QUEUED, 1), (JobState.QUEUED, 4))
    assert decide(noon, jobs, Capacity(4, 60)) == [
        Wait("job-1", "WaitingForSlots", "needs 4 slots, 1 free", 1),
        Wait("job-2", "WaitingForTurn", "needs 1 slot, 1 free; 1 job ahead", 2),
        Wait("job-3", "WaitingForTurn", "needs 4 slots, 1 free; 2 jobs ahead", 3),
    ]


def test_a_job_larger_than_the_coordinator_says_so_and_holds_nobody_up(queue, noon) -> None:
    jobs = queue((JobState.QUEUED, 4), (JobState.QUEUED, 2))
    assert decide(noon, jobs, Capacity(2, 60)) == [
        Start("job-1"),
        Wait(
            "job-0",
            "TooFewSlots",
            "needs 4 slots, this coordinator has 2 in all: restart it with --slots 4, or cancel the job",
            1,
        ),
    ]


def test_a_launched_job_that_never_reports_is_given_up_after_its_deadline_and_not_before(make_job, noon) -> None:
    starting = [make_job(state=JobState.STARTING)]
    assert decide(noon + timedelta(seconds=60), starting, Capacity(2, 60)) == []
    (action,) = decide(noon + timedelta(seconds=60.001), starting, Capacity(2, 60))
    assert isinstance(action, GiveUp)
    assert action.reason == "StartDeadlineExceeded"
    assert "no rank reported within 60 s" in action.message
    assert decide(noon + timedelta(hours=9), [make_job(state=JobState.RUNNING)], Capacity(2, 60)) == []
