"""The states of a job and the moves between them, with invented times."""

import itertools
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator import jobs
from coordinator.jobs import ENDED, TRANSITIONS, IllegalMove, JobState, advance, is_id, new_id, submitted
from protos import job_pb2

EVENTS = (
    jobs.Waited("WaitingForSlots", "needs 2 slots, 1 free", 1),
    jobs.Admitted("digest"),
    jobs.Launched(jobs.Process(12, 345)),
    jobs.Observed("HeldForNodes", "Slurm job 7 waits (Resources)"),
    jobs.Observed("Launching", "Slurm job 7 runs on vm"),
    jobs.Reported(),
    jobs.Finished(job_pb2.Summary(steps=4)),
    jobs.Broke("RankKilled", "rank 1 was killed"),
    jobs.Lost("RankKilled", "rank 1 was killed"),
    jobs.PauseAsked(),
    jobs.Paused("paused"),
    jobs.ResumeAsked(),
    jobs.CancelAsked(),
    jobs.Stopped("cancelled"),
)
LATER = timedelta(seconds=5)


@pytest.mark.parametrize("state", JobState)
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_a_move_is_in_the_table_or_raises_and_changes_nothing(make_job, noon, state, event) -> None:
    job = make_job(state=state, token_digest="digest")
    allowed = TRANSITIONS[state].get(type(event))
    if allowed is None:
        with pytest.raises(IllegalMove, match=f"job digits-000000 is {state}: {type(event).__name__}"):
            advance(job, event, noon + LATER)
    else:
        assert advance(job, event, noon + LATER).state is allowed
    assert job == make_job(state=state, token_digest="digest")


@given(st.lists(st.sampled_from(EVENTS), max_size=12))
def test_history_is_a_walk_through_the_table_that_ends_with_the_job(make_job, noon, events) -> None:
    job = submitted("digits-000000", job_pb2.JobSpec(workers=1), noon)
    for number, event in enumerate(events, start=1):
        if type(event) not in TRANSITIONS[job.state]:
            continue
        before, job = job, advance(job, event, noon + number * LATER)
        assert job.history[: len(before.history)] == before.history
        assert job.create_time == noon
    states = [change.state for change in job.history]
    assert all(after in TRANSITIONS[before].values() for before, after in itertools.pairwise(states))
    assert not ENDED.intersection(states[:-1])
    assert job.token_digest is None or not job.ended


def test_an_ended_state_has_no_way_out() -> None:
    assert {state for state, moves in TRANSITIONS.items() if not moves} == ENDED


def test_waiting_says_why_without_growing_the_history(make_job, noon) -> None:
    job = advance(make_job(), jobs.Waited("WaitingForSlots", "needs 2 slots, 1 free", 3), noon + LATER)
    assert (job.reason, job.message, job.queue_position) == ("WaitingForSlots", "needs 2 slots, 1 free", 3)
    assert job.history == make_job().history
    assert job.state_time == noon


def test_an_attempt_begins_with_a_token_that_dies_with_the_job(make_job, noon) -> None:
    job = advance(make_job(queue_position=2), jobs.Admitted("digest"), noon)
    assert (job.attempt, job.token_digest, job.queue_position) == (1, "digest", 0)
    job = advance(job, jobs.Launched(jobs.Process(12, 345)), noon)
    assert job.process == jobs.Process(12, 345)
    job = advance(job, jobs.Broke("RankKilled", "rank 1 was killed"), noon + LATER)
    assert (job.token_digest, job.process) == (None, None)
    assert job.history[-1] == (JobState.FAILED, "RankKilled", "rank 1 was killed", noon + LATER)


def test_a_queued_job_is_cancelled_at_once_and_a_running_one_first_stops_its_ranks(make_job, noon) -> None:
    assert advance(make_job(), jobs.CancelAsked(), noon).state is JobState.CANCELLED
    stopping = advance(make_job(state=JobState.RUNNING), jobs.CancelAsked(), noon)
    assert stopping.state is JobState.CANCELLING
    assert advance(stopping, jobs.CancelAsked(), noon + LATER) == stopping


def test_a_job_that_is_to_pause_says_so_until_its_ranks_have_left(make_job, noon) -> None:
    job = advance(advance(make_job(), jobs.Admitted("digest"), noon), jobs.PauseAsked(), noon)
    job = advance(job, jobs.Reported(), noon)
    assert (job.state, job.reason, job.pausing) == (JobState.RUNNING, "PauseRequested", True)
    assert advance(job, jobs.PauseAsked(), noon) == job
    paused = advance(job, jobs.Paused("paused; its ranks wrote a checkpoint and left"), noon + LATER)
    assert (paused.state, paused.pausing, paused.token_digest) == (JobState.PAUSED, False, None)
    assert advance(paused, jobs.ResumeAsked(), noon + LATER).state is JobState.QUEUED
    assert advance(paused, jobs.CancelAsked(), noon + LATER).state is JobState.CANCELLED


def test_what_has_no_processes_is_paused_and_cancelled_at_once(make_job, noon) -> None:
    assert advance(make_job(), jobs.PauseAsked(), noon).state is JobState.PAUSED
    for event, state in ((jobs.PauseAsked(), JobState.PAUSED), (jobs.CancelAsked(), JobState.CANCELLED)):
        assert advance(make_job(state=JobState.RESTARTING), event, noon).state is state


@given(st.text(max_size=200))
def test_an_id_is_safe_as_a_folder_whatever_the_name(name) -> None:
    job_id = new_id(name)
    assert is_id(job_id)
    assert len(job_id) <= 47


def test_an_id_begins_with_the_name() -> None:
    assert new_id("Fashion MLP (v2)").rpartition("-")[0] == "fashion-mlp-v2"
    assert new_id("數字").rpartition("-")[0] == "job"
    assert new_id("a") != new_id("a")


@pytest.mark.parametrize("text", ["", ".", "..", "../a", "a/b", "-a", "a-", "A", "a.b", "a\n", "a" * 49, "a b"])
def test_what_could_lead_out_of_a_folder_is_no_id(text) -> None:
    assert not is_id(text)


def test_a_stay_in_another_systems_queue_is_in_the_history_and_its_reasons_are_not(make_job, noon) -> None:
    job = advance(make_job(), jobs.Admitted("digest"), noon)
    for minute, words in enumerate(["HeldForTurn", "HeldForNodes", "Launching", "Launching"], start=1):
        job = advance(job, jobs.Observed(words, f"minute {minute}"), noon + timedelta(minutes=minute))
        assert (job.reason, job.message) == (words, f"minute {minute}")
    told = [(change.reason, change.time - noon) for change in job.history[1:]]
    minute = timedelta(minutes=1)
    assert told == [("Launching", 0 * minute), ("HeldForTurn", minute), ("Launching", 3 * minute)]
