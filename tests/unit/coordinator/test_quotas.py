"""Limits: how they are given, and what is said of a job that is beyond one."""

import dataclasses

import pytest

from coordinator.quotas import DEFAULT_QUOTAS, LIMITS, Quotas, check_job, check_queue, read_quotas
from coordinator.refusals import Refused
from protos import job_pb2


def test_each_limit_is_a_row_of_the_table_and_can_be_given() -> None:
    fields = [field.name for field in dataclasses.fields(Quotas)]
    assert [limit.field for limit in LIMITS.values()] == fields
    given = read_quotas([f"{name}={number}" for number, name in enumerate(LIMITS, 5)])
    assert dataclasses.astuple(given) == tuple(range(5, 5 + len(fields)))
    assert read_quotas([]) == DEFAULT_QUOTAS
    assert read_quotas(["queue=5", "queue=0"]).queue == 0


@pytest.mark.parametrize(
    ("setting", "fault"),
    [
        ("users=4", "there is no limit 'users'; there are queue, running, user.queue"),
        ("queue", "'' is not a whole number from 0"),
        ("queue=-1", "'-1' is not a whole number from 0"),
        ("queue=many", "'many' is not a whole number from 0"),
    ],
)
def test_what_is_no_limit_is_named(setting, fault) -> None:
    with pytest.raises(ValueError, match=fault):
        read_quotas([setting])


def test_the_queue_takes_as_many_as_its_limit_and_not_one_more() -> None:
    quotas = Quotas(queue=3, user_queue=2)
    check_queue(quotas, 2, 1)
    with pytest.raises(Refused) as whole:
        check_queue(quotas, 3, 0)
    assert (whole.value.reason, whole.value.quota) == ("LimitExceeded", "queue")
    assert whole.value.message == (
        "3 wait, and the limit is queue=3 (jobs that wait, of everybody): submit it later, or cancel one that waits"
    )
    with pytest.raises(Refused) as own:
        check_queue(quotas, 2, 2)
    assert own.value.quota == "user.queue"
    check_queue(Quotas(queue=0), 10**6, 10**6)


def test_a_job_is_held_against_the_size_of_its_files_and_its_slots(tmp_path) -> None:
    (tmp_path / "x.npy").write_bytes(bytes(600))
    (tmp_path / "y.npy").write_bytes(bytes(400))
    spec = job_pb2.JobSpec(workers=2, labels={"a": "b"})
    spec.data.train.npy.features = str(tmp_path / "x.npy")
    spec.data.train.npy.targets = str(tmp_path / "y.npy")
    spec.data.validation.csv.path = str(tmp_path / "missing.csv")
    spec.initialize_from = "s3://bucket/model"
    check_job(spec, Quotas(job_slots=2, job_data_bytes=1000))
    with pytest.raises(Refused, match=r"this job names 1000, and the limit is job\.data_bytes=999"):
        check_job(spec, Quotas(job_data_bytes=999))
    with pytest.raises(Refused, match=r"this job takes 2, and the limit is job\.slots=1 .*: ask for fewer workers"):
        check_job(spec, Quotas(job_slots=1))
