"""The initial weights that the benchmark of quality gives PyTorch, against ours: the same distributions."""

import json

import numpy as np
import pytest

from protos.job_file import parse_job
from tests.benchmarks.cases import CASES, CONTEXT, Case
from tests.benchmarks.contenders import PEERS
from worker.engine.model import Model

torch = pytest.importorskip("torch", reason="PyTorch is not installed: make test-oracle installs and runs it")
pytestmark = pytest.mark.oracle

IMAGE_SHAPE = (28, 28)


def describe(weights: np.ndarray) -> tuple[float, float, float]:
    """Mean, standard deviation and how many of them the largest value lies out: 1.7 for uniform, more for normal."""
    deviation = float(weights.std())
    return float(weights.mean()), deviation, float(np.abs(weights).max()) / deviation if deviation else 0.0


@pytest.mark.parametrize("case", [case for case in CASES if case.kind != "mlp"], ids=lambda case: case.name)
def test_each_parameter_is_drawn_as_ours(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PEERS))
    from pytorch_initial_weights import draw_weights
    from pytorch_model import make_model

    words = {"data": {"train": {"built_in": "digits"}}, "loss": "softmax_cross_entropy", "optimizer": "adam"}
    job = parse_job(json.dumps(words | {"model": case.model}))
    ours = Model(job.model, job.loss, (CONTEXT,) if case.of_text else (*IMAGE_SHAPE, 1))
    ours.attach(np.empty(ours.parameter_count, np.float32))
    ours.initialize(seed=1)
    torch.manual_seed(1)
    theirs = make_model(list(case.model), (CONTEXT,) if case.of_text else IMAGE_SHAPE)
    draw_weights(list(case.model), theirs)

    for (name, mine), parameter in zip(ours.named_parameters().items(), theirs.parameters(), strict=True):
        other = parameter.detach().numpy()
        assert other.size == mine.size, name
        (mean, deviation, reach), (other_mean, other_deviation, other_reach) = describe(mine), describe(other)
        error = deviation / np.sqrt(mine.size)
        assert other_mean == pytest.approx(mean, abs=8 * error), name
        assert other_deviation == pytest.approx(deviation, abs=5 * error), name
        assert (other_reach > 2) == (reach > 2), name
