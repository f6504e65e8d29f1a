"""Batch normalization against PyTorch's BatchNorm1d and 2d: several steps, then evaluation, gradients in both."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos import job_pb2
from tests.unit.engine.differences import INPUT_GRADIENT, OUTPUT, PARAMETER_GRADIENTS, hold
from worker.engine.layers import LAYERS
from worker.engine.layers.layer import Moment

torch = pytest.importorskip("torch", reason="PyTorch is not installed: make test-oracle installs and runs it")
pytestmark = pytest.mark.oracle

SIZES = st.integers(1, 6)
STEPS = 3
# In float32 PyTorch's own sums are float32 too.
TOLERANCES = {np.float64: 1e-10, np.float32: 5e-5}


def channels_first(x):
    """(n, ..., channels) as PyTorch has it, (n, channels, ...)."""
    return np.ascontiguousarray(np.moveaxis(x, -1, 1))


def channels_last(tensor):
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


@pytest.mark.parametrize("dtype", TOLERANCES)
@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(2, 7),
    lead=st.lists(SIZES, max_size=2),
    channels=st.integers(1, 40),
    momentum=st.floats(0.01, 1),
    center=st.floats(-20, 20),
    block=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
)
def test_steps_and_evaluation_equal_torch_s(dtype, samples, lead, channels, momentum, center, block, seed):
    random = np.random.default_rng(seed)
    options = job_pb2.BatchNormLayer(momentum=momentum, epsilon=1e-2, synchronized=False)
    layer = LAYERS["batch_norm"](options, (*lead, channels))
    layer.block = block  # rows: few, so that there are several blocks
    values = [random.standard_normal(channels).astype(dtype) for _ in range(2)]
    gradients = [np.full_like(value, np.nan) for value in values]
    layer.attach(values, gradients)
    state = [np.full(channels, array.initial, dtype) for array in layer.state]
    layer.attach_state(state, np.zeros(layer.sum_count), lambda sums: None)
    layer.reserve(samples, dtype, in_place=False)

    kind = torch.nn.BatchNorm2d if len(lead) == 2 else torch.nn.BatchNorm1d
    module = kind(channels, eps=1e-2, momentum=momentum, dtype=torch.from_numpy(values[0]).dtype)
    with torch.no_grad():
        for parameter, value in zip((module.weight, module.bias), values, strict=True):
            parameter.copy_(torch.tensor(value))

    def close(ours, theirs, what):
        hold("batch_norm", what, ours, theirs, TOLERANCES[dtype])

    for step in range(1, STEPS + 2):
        training = step <= STEPS
        module.train(training)
        layer.begin(Moment(seed=1, step=step, first=0) if training else None)
        x = (center + random.standard_normal((samples, *lead, channels))).astype(dtype)
        dy = random.standard_normal(x.shape).astype(dtype)
        theirs_x = torch.tensor(channels_first(x), requires_grad=True)
        module.zero_grad()
        theirs = module(theirs_x)
        theirs.backward(torch.tensor(channels_first(dy)))
        close(layer.forward(x), channels_last(theirs), OUTPUT)
        layer.backward_parameters(dy)
        close(gradients[0], module.weight.grad.numpy(), PARAMETER_GRADIENTS)
        close(gradients[1], module.bias.grad.numpy(), PARAMETER_GRADIENTS)
        close(layer.backward_input(dy.copy()), channels_last(theirs_x.grad), INPUT_GRADIENT)
        if training:
            layer.update_state()
        close(state[0], module.running_mean.numpy(), "running mean")
        close(state[1], module.running_var.numpy(), "running variance")
