"""What a plan offers: the plain all-reduce, what the job's other fields allow, and what its own file asks for."""

import json

import pytest

from protos.job_file import parse_job
from worker.plan.choices import Choice, WireFormat
from worker.plan.offers import LOCAL_STEPS, as_sync, offers

INT8 = WireFormat("int8", 1.0, 0.0, 0.0, sums_well=True)
FACTORS = WireFormat("power_sgd", 0.2, 0.0, 0.0, sums_well=True, factors=(0.1, 0.1))
DENSE = {"dense": {"units": 10}}


def job_of(sync: object = "all_reduce", **parts: object):
    job = {"data": {"train": {"built_in": "digits"}}, "model": [DENSE], "loss": "softmax_cross_entropy",
           "optimizer": "adam", "sync": sync}  # fmt: skip
    return parse_job(json.dumps(job | parts))


def kinds(choices: list[Choice]) -> set[str]:
    return {choice.kind for choice in choices}


def test_a_plain_job_may_choose_everything_and_each_choice_can_be_written_into_its_file() -> None:
    choices = offers(job_of(), 2, [INT8, FACTORS], 1000)
    assert choices[0] == Choice("all_reduce")
    assert kinds(choices) == {"all_reduce", "parameter_server", "local"}
    assert [choice.steps for choice in choices if choice.kind == "local"] == list(LOCAL_STEPS)
    for choice in choices:
        job_of(as_sync(choice))


@pytest.mark.parametrize(
    ("parts", "gone"),
    [
        ({"training": {"clip_norm": 1.0}}, lambda choice: choice.kind == "parameter_server" and choice.servers > 1),
        ({"training": {"reproducible": True}}, lambda choice: choice.kind == "local" or choice.wire == INT8),
        ({"model": [DENSE, {"batch_norm": {"synchronized": True}}, DENSE]}, lambda choice: choice.kind == "local"),
    ],
    ids=["clip_norm", "reproducible", "synchronized"],
)
def test_what_the_jobs_other_fields_forbid_is_not_offered(parts, gone) -> None:
    choices = offers(job_of(**parts), 4, [INT8], 1000)
    assert not list(filter(gone, choices))
    assert list(filter(gone, offers(job_of(), 4, [INT8], 1000)))


def test_local_steps_beyond_an_epoch_are_offered_only_where_the_file_asks_for_them() -> None:
    assert [choice.steps for choice in offers(job_of(), 2, [], 23) if choice.kind == "local"] == [4, 16]
    own = job_of({"local": {"steps": 500}})
    assert [choice.steps for choice in offers(own, 2, [], 2) if choice.kind == "local"] == [500]
