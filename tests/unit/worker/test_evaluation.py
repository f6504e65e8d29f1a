"""How many samples are evaluated at a time."""

import pytest

from protos.job_file import parse_job
from worker.engine.model import Model
from worker.evaluation import MOST_BYTES, MOST_SAMPLES, samples_at_once

BLOCK = "residual: {layers: [{linear: {units: 1024}}, gelu, {linear: {units: 64}}]}"


def made(layers: str, shape: tuple[int, ...]) -> Model:
    job = parse_job(f"{{data: {{train: {{built_in: digits}}}}, model: [{layers}], loss: huber, optimizer: sgd}}")
    return Model(job.model, job.loss, shape)


@pytest.mark.parametrize(("samples", "expected"), [(0, 1), (3, 3), (MOST_SAMPLES + 1, MOST_SAMPLES)])
def test_small_samples_are_evaluated_many_at_a_time(samples: int, expected: int) -> None:
    assert samples_at_once(made("dense: {units: 10}", (784,)), samples) == expected


def test_large_samples_are_evaluated_as_memory_allows_also_within_residual_layers() -> None:
    model = made(f"{BLOCK}, {BLOCK}, dense: {{units: 1}}", (128, 64))
    at_once = samples_at_once(model, 10_000)
    bytes_per_sample = 4 * (2 * 128 * (1024 + 1024 + 64 + 64) + 1)
    assert at_once == MOST_BYTES // bytes_per_sample < MOST_SAMPLES


def test_a_sample_larger_than_the_memory_asked_for_is_evaluated_alone() -> None:
    assert samples_at_once(made("linear: {units: 4096}, dense: {units: 1}", (8192, 1)), 10) == 1
