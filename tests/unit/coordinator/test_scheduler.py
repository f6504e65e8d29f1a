"""Who starts and who waits, with invented jobs and times."""

from dataclasses import replace
from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.jobs import LAUNCHED, Admitted, JobState, Observed, Reported, advance
from coordinator.quotas import Quotas
from coordinator.scheduler import Capacity, GiveUp, Start, Wait, decide, queue_order

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
    waiting = {JobState.QUEUED, JobState.RESTARTING}
    assert sorted(action.job_id for action in actions) == sorted(job.id for job in jobs if job.state in waiting)
    waits = [action for action in actions if isinstance(action, Wait)]
    assert all(wait.message and wait.reason for wait in waits)
    waits = [wait for wait in waits if jobs[int(wait.job_id.removeprefix("job-"))].state is JobState.QUEUED]
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


# ------------------------------------------------------------------------------- priorities, owners and limits


def queued(make_job, noon, number, owner="", priority=0, workers=1, state=JobState.QUEUED):
    """A job submitted `number` seconds after noon."""
    job = make_job(f"job-{number}", state, workers, owner=owner)
    job.spec.priority = priority
    return replace(job, history=(job.history[0]._replace(time=noon + timedelta(seconds=number)),))


OWNED = st.lists(
    st.tuples(
        st.sampled_from((JobState.QUEUED, JobState.QUEUED, JobState.RUNNING)),
        st.sampled_from("abc"),
        st.integers(-1, 1),
        st.integers(1, 5),
    ),
    max_size=14,
)


@pytest.fixture(scope="session")
def owned(make_job, noon):
    def make(situation):
        return [
            queued(make_job, noon, number, owner, priority, workers, state)
            for number, (state, owner, priority, workers) in enumerate(situation)
        ]

    return make


@given(OWNED, st.integers(1, 8), st.integers(0, 3), st.integers(0, 3))
def test_no_limit_is_exceeded_and_every_queued_job_is_answered_once(owned, noon, situation, slots, each, whole) -> None:
    jobs = owned(situation)
    quotas = Quotas(user_running=each, running=whole)
    actions = decide(noon, jobs, Capacity(slots, 60, quotas))
    assert sorted(action.job_id for action in actions) == sorted(job.id for job in jobs if job.state is JobState.QUEUED)
    before = [job for job in jobs if job.state is JobState.RUNNING]
    names = {action.job_id for action in actions if isinstance(action, Start)}
    started = [job for job in jobs if job.id in names]
    assert not started or sum(job.slots for job in [*before, *started]) <= slots
    assert not (started and whole) or len(before) + len(started) <= whole
    for owner in {job.owner for job in started} if each else ():
        assert sum(job.owner == owner for job in [*before, *started]) <= each
    waits = [action for action in actions if isinstance(action, Wait)]
    assert [wait.queue_position for wait in waits] == list(range(1, len(waits) + 1))


@given(OWNED)
def test_higher_priority_goes_first_and_an_owners_jobs_keep_their_order(owned, situation) -> None:
    order = queue_order(owned(situation), {})
    assert [job.spec.priority for job in order] == sorted((job.spec.priority for job in order), reverse=True)
    for owner in "abc":
        for priority in (-1, 0, 1):
            times = [job.create_time for job in order if (job.owner, job.spec.priority) == (owner, priority)]
            assert times == sorted(times)


@given(OWNED)
def test_a_job_submitted_later_by_the_same_owner_moves_nobody(owned, make_job, noon, situation) -> None:
    jobs = owned(situation)
    order = [job.id for job in queue_order(jobs, {})]
    more = [*jobs, queued(make_job, noon, 99, "a", -1)]
    with_it = [job.id for job in queue_order(more, {})]
    if any(job.owner == "a" and job.spec.priority == -1 and job.state is JobState.QUEUED for job in jobs):
        with_it.remove("job-99")
        assert with_it == order
    else:
        assert [job_id for job_id in with_it if job_id != "job-99"] == order


@given(OWNED, st.integers(5, 8), st.booleans())
def test_at_equal_priority_every_job_starts_whatever_others_go_on_submitting(
    owned, make_job, noon, situation, slots, new_names
) -> None:
    """Rounds in which all that runs ends, while somebody submits more than fits: by one name, or by a new one each."""
    jobs = owned([(state, owner, 0, workers) for state, owner, _, workers in situation])
    missing = {job.id for job in jobs if job.state is JobState.QUEUED}
    served: dict[str, datetime] = {}
    for number in range(100, 100 + 3 * len(jobs) + 3):
        now = noon + timedelta(seconds=number)
        started = {
            action.job_id for action in decide(now, jobs, Capacity(slots, 60), served) if isinstance(action, Start)
        }
        served |= {job.owner: now for job in jobs if job.id in started}
        missing -= started
        if not missing:
            return
        left = [job for job in jobs if job.state is JobState.QUEUED and job.id not in started]
        owner = f"z{number}" if new_names else "z"
        jobs = [*left, *(queued(make_job, noon, 1000 * number + extra, owner) for extra in range(slots))]
    raise AssertionError(f"never started: {missing}")


def test_within_a_priority_owners_take_turns_by_the_slots_they_hold(make_job, noon) -> None:
    running = queued(make_job, noon, 0, "ada", workers=2, state=JobState.RUNNING)
    waiting = [
        queued(make_job, noon, number, owner) for number, owner in enumerate(["ada", "ada", "bob", "bob", "bob"], 1)
    ]
    order = [job.id for job in queue_order([running, *waiting], {})]
    assert order == ["job-3", "job-4", "job-1", "job-5", "job-2"]


def test_among_owners_with_nothing_the_one_served_longest_ago_goes_first(make_job, noon) -> None:
    waiting = [queued(make_job, noon, 10, "ada"), queued(make_job, noon, 11, "bob")]
    served = {"ada": noon + timedelta(seconds=9), "bob": noon + timedelta(seconds=8)}
    assert [job.owner for job in queue_order(waiting, served)] == ["bob", "ada"]
    assert [job.owner for job in queue_order(waiting, {})] == ["ada", "bob"]


def test_a_user_at_the_limit_waits_with_the_reason_and_holds_nobody_up(make_job, noon) -> None:
    jobs = [
        queued(make_job, noon, 0, "ada", state=JobState.RUNNING),
        queued(make_job, noon, 1, "ada", priority=5),
        queued(make_job, noon, 2, "bob"),
    ]
    wait, start = decide(noon, jobs, Capacity(4, 60, Quotas(user_running=1)))
    assert start == Start("job-2")
    assert wait == Wait(
        "job-1",
        "UserRunningLimit",
        "limit user.running=1 (jobs of one user launched at once) is reached: it starts when one of them ends",
        1,
    )


def test_at_the_limit_of_running_jobs_all_wait_though_slots_are_free(make_job, noon) -> None:
    jobs = [queued(make_job, noon, 0, state=JobState.RUNNING), queued(make_job, noon, 1), queued(make_job, noon, 2)]
    actions = decide(noon, jobs, Capacity(4, 60, Quotas(running=1)))
    assert [(action.reason, action.queue_position) for action in actions] == [("RunningLimit", 1), ("RunningLimit", 2)]


def test_a_job_past_its_own_limit_of_seconds_is_stopped_counted_from_its_launch(make_job, noon) -> None:
    job = make_job(state=JobState.STARTING)
    job.spec.limits.seconds = 30
    later = job.history[0]._replace(state=JobState.RUNNING, time=noon + timedelta(seconds=20))
    job = replace(job, history=(*job.history, later))
    assert decide(noon + timedelta(seconds=30), [job], Capacity(2, 60)) == []
    (action,) = decide(noon + timedelta(seconds=30.001), [job], Capacity(2, 60))
    assert action == GiveUp(
        job.id,
        "DeadlineExceeded",
        "stopped: it ran for longer than limits.seconds allows, 30 s; what it left can be pulled",
    )


def test_time_in_another_systems_queue_counts_against_no_deadline(make_job, noon) -> None:
    job = make_job(workers=1)
    job.spec.limits.seconds = 300
    hour = timedelta(hours=1)
    held = advance(advance(job, Admitted("digest"), noon), Observed("HeldForNodes", "waits for nodes"), noon)
    assert decide(noon + hour, [held], Capacity(1, 60)) == []
    begun = advance(held, Observed("Launching", "runs on vm"), noon + hour)
    assert decide(noon + hour + timedelta(seconds=59), [begun], Capacity(1, 60)) == []
    (late,) = decide(noon + hour + timedelta(seconds=61), [begun], Capacity(1, 60))
    assert late.reason == "StartDeadlineExceeded"
    (ran,) = decide(noon + hour + timedelta(seconds=301), [advance(begun, Reported(), noon + hour)], Capacity(1, 60))
    assert ran.reason == "DeadlineExceeded"


def test_a_start_that_takes_too_long_says_what_another_system_said_of_it(make_job, noon) -> None:
    job = advance(make_job(), Admitted("digest"), noon)
    job = advance(job, Observed("ImagePullBackOff", "pod x: image y cannot be pulled"), noon)
    (late,) = decide(noon + timedelta(seconds=61), [job], Capacity(1, 60))
    assert "60 s of the launch; pod x: image y cannot be pulled; `paceline logs" in late.message
