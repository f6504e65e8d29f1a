"""Schedules: against PyTorch's, and what holds for each of them."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos import job_pb2
from protos.job_file import JobFileInvalid, parse_job
from worker.schedules import SCHEDULES, make_schedule, plateaus

BASE, BATCH, EPOCH_SAMPLES, EPOCHS = 0.3, 10, 200, 6
STEPS_PER_EPOCH = EPOCH_SAMPLES // BATCH
STEPS = EPOCHS * STEPS_PER_EPOCH
JOB = """
data: {train: {built_in: digits}, validation_fraction: 0.2}
model: [dense: {units: 10}]
loss: softmax_cross_entropy
optimizer: sgd
schedule: %s
"""
TEXTS = {
    "constant": "constant",
    "step": "{step: {epochs: 2, factor: 0.5}}",
    "cosine": "{cosine: {final: 0.1}}",
    "one_cycle": "{one_cycle: {rise: 0.25}}",
    "exponential": "{exponential: {factor: 0.8}}",
    "reduce_on_plateau": "{reduce_on_plateau: {factor: 0.5, patience: 1}}",
}
LOSSES = (1.0, 0.9, 0.95, 0.95, 0.95, 0.95)


def spec(text: str) -> job_pb2.Schedule:
    return parse_job(JOB % text).schedule


def rates(text: str, losses: tuple[float, ...] = LOSSES, batch: int = BATCH) -> list[float]:
    """The rate of each step of a training in batches of `batch`."""
    schedule = make_schedule(spec(text), BASE, EPOCH_SAMPLES, EPOCHS)
    return [schedule(seen, losses[: seen // EPOCH_SAMPLES]) for seen in range(0, EPOCHS * EPOCH_SAMPLES, batch)]


def test_every_schedule_of_the_job_file_is_tested_here() -> None:
    kinds = [field.name for field in job_pb2.Schedule.DESCRIPTOR.oneofs_by_name["kind"].fields]
    assert list(TEXTS) == list(SCHEDULES) == kinds


@pytest.mark.parametrize("kind", TEXTS)
def test_the_rate_is_a_function_of_samples_and_not_of_steps(kind: str) -> None:
    assert rates(TEXTS[kind], batch=4 * BATCH) == rates(TEXTS[kind])[::4]


@given(kind=st.sampled_from(list(TEXTS)), warm_up=st.floats(0, 8), seen=st.integers(0, EPOCHS * EPOCH_SAMPLES))
def test_no_rate_is_below_zero_or_above_the_base(kind: str, warm_up: float, seen: int) -> None:
    schedule = spec(TEXTS[kind])
    schedule.warm_up_epochs = warm_up
    assert 0 <= make_schedule(schedule, BASE, EPOCH_SAMPLES, EPOCHS)(seen, LOSSES) <= BASE * (1 + 1e-12)


@pytest.mark.parametrize("kind", TEXTS)
def test_warm_up_rises_in_a_line_to_where_the_schedule_begins(kind: str) -> None:
    text = f"{{{kind}: {{}}" if kind != "step" else "{step: {epochs: 3}"
    plain = rates(text + "}", losses=())[0]
    warm = rates(text + ", warm_up_epochs: 1.5, warm_up_start: 0.2}", losses=())
    expected = [plain * (0.2 + 0.8 * step / 30) for step in range(31)]
    assert warm[:31] == pytest.approx(expected)
    assert rates("{warm_up_epochs: 1.5, warm_up_start: 0.2}")[31] == BASE


def test_cosine_and_one_cycle_end_where_the_training_ends() -> None:
    for text, final in (("{cosine: {final: 0.1}, warm_up_epochs: 2}", 0.1), ("{one_cycle: {final: 0.2}}", 0.2)):
        end = make_schedule(spec(text), BASE, EPOCH_SAMPLES, EPOCHS)(EPOCHS * EPOCH_SAMPLES, ())
        assert end == pytest.approx(BASE * final)


def test_plateaus_are_counted_from_the_losses_alone() -> None:
    options = spec("{reduce_on_plateau: {patience: 1, minimum_improvement: 0.1, cooldown: 2}}").reduce_on_plateau
    assert plateaus(options, ()) == 0
    assert plateaus(options, (1.0, 0.95)) == 0
    assert plateaus(options, (1.0, 0.95, 0.92)) == 1
    assert plateaus(options, (1.0, 0.95, 0.92, 0.92, 0.92, 0.92)) == 1
    assert plateaus(options, (1.0, 0.95, 0.92, 0.92, 0.92, 0.92, 0.92)) == 2
    assert plateaus(options, (1.0, math.nan, math.nan)) == 1


def test_a_plateau_without_validation_is_refused() -> None:
    text = (JOB % "reduce_on_plateau").replace(", validation_fraction: 0.2", "")
    with pytest.raises(JobFileInvalid) as caught:
        parse_job(text)
    assert str(caught.value) == (
        "schedule.reduce_on_plateau: needs a validation loss: give data.validation or data.validation_fraction"
    )


def peer_rates(torch, make, steps, metrics=None) -> list[float]:
    """The rates of PyTorch's scheduler, stepped `steps` times."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))], lr=BASE)
    scheduler = make(torch.optim.lr_scheduler, optimizer)
    found = []
    for index in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step(*(() if metrics is None else (metrics[index],)))
    return found


PEERS = {
    "step": lambda peers, optimizer: peers.StepLR(optimizer, 2 * STEPS_PER_EPOCH, 0.5),
    "cosine": lambda peers, optimizer: peers.CosineAnnealingLR(optimizer, STEPS, eta_min=0.1 * BASE),
    # PyTorch peaks and ends one step early: with these two numbers it does so where we do.
    "one_cycle": lambda peers, optimizer: peers.OneCycleLR(
        optimizer, BASE, total_steps=STEPS + 1, pct_start=(0.25 * STEPS + 1) / (STEPS + 1), cycle_momentum=False
    ),
    "exponential": lambda peers, optimizer: peers.ExponentialLR(optimizer, 0.8 ** (1 / STEPS_PER_EPOCH)),
}


@pytest.mark.oracle
@pytest.mark.parametrize("kind", PEERS)
def test_rates_equal_torch_s(kind: str) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make test-oracle installs and runs it")
    assert rates(TEXTS[kind]) == pytest.approx(peer_rates(torch, PEERS[kind], STEPS), rel=1e-12)


@pytest.mark.oracle
def test_warm_up_equals_torch_s() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make test-oracle installs and runs it")

    def make(peers, optimizer):
        warm = peers.LinearLR(optimizer, 0.1, total_iters=STEPS_PER_EPOCH)
        rest = peers.CosineAnnealingLR(optimizer, STEPS - STEPS_PER_EPOCH)
        return peers.SequentialLR(optimizer, [warm, rest], [STEPS_PER_EPOCH])

    ours = rates("{cosine: {}, warm_up_epochs: 1, warm_up_start: 0.1}")
    assert ours == pytest.approx(peer_rates(torch, make, STEPS), rel=1e-12, abs=1e-15)


@pytest.mark.oracle
@settings(deadline=None)
@given(
    losses=st.lists(st.floats(0.01, 2) | st.sampled_from([0.5, 0.6]), min_size=1, max_size=40),
    patience=st.integers(0, 3),
    cooldown=st.integers(0, 3),
)
def test_plateaus_equal_torch_s(losses: list[float], patience: int, cooldown: int) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: make test-oracle installs and runs it")
    options = f"{{factor: 0.5, patience: {patience}, cooldown: {cooldown}, minimum_improvement: 0.05, minimum: 0.01}}"
    schedule = make_schedule(spec(f"{{reduce_on_plateau: {options}}}"), BASE, EPOCH_SAMPLES, EPOCHS)

    def make(peers, optimizer):
        return peers.ReduceLROnPlateau(
            optimizer, factor=0.5, patience=patience, cooldown=cooldown, threshold=0.05, min_lr=0.01 * BASE, eps=0
        )

    ours = [schedule(0, tuple(losses[:epochs])) for epochs in range(len(losses))]
    assert ours == pytest.approx(peer_rates(torch, make, len(losses), losses), rel=1e-12)
