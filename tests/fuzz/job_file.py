"""The job file: refused with JobFileInvalid, or read, and then what it is written out as reads the same."""

from __future__ import annotations

from pathlib import Path

from protos.job_file import JobFileInvalid, parse_job, read_job_file, to_yaml
from tests.fuzz.scratch import scratch_file

FILE = scratch_file("job.yaml")
SEEDS = [path.read_bytes() for path in sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))]
SEEDS.append(b"data: {train: {built_in: digits}}\nmodel: [relu]\nloss: huber\noptimizer: sgd\nlabels: {a: b}\n")
SEEDS.append(b'{"data": {"train": {"built_in": "digits"}}, "model": ["relu"], "loss": "huber", "optimizer": "sgd"}')


def read(data: bytes) -> None:
    FILE.write_bytes(data)
    try:
        spec = read_job_file(FILE)
    except JobFileInvalid:
        return
    assert parse_job(to_yaml(spec)) == spec
