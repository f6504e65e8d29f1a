"""Each layer against PyTorch over drawn shapes: forward, gradient of the input, gradients of the parameters."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.engine.differences import INPUT_GRADIENT, OUTPUT, PARAMETER_GRADIENTS, hold
from worker.engine.layers import LAYERS

torch = pytest.importorskip("torch", reason="PyTorch is not installed: make test-oracle installs and runs it")
pytestmark = pytest.mark.oracle
functional = torch.nn.functional

TOLERANCE = {np.float64: 1e-11, np.float32: 2e-5}
ACTIVATIONS = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": functional.relu,
    "leaky_relu:0.2": lambda x: functional.leaky_relu(x, 0.2),
    "gelu": functional.gelu,
    "silu": functional.silu,
    "elu:1": functional.elu,
    "elu:0.3": lambda x: functional.elu(x, 0.3),
    "softplus": lambda x: functional.softplus(x, threshold=40),
    "flatten": lambda x: x.flatten(1),
}
DTYPES = st.sampled_from([np.float64, np.float32])
SEEDS = st.integers(0, 2**32 - 1)


def compare(engine: SimpleNamespace, word: str, shape: tuple[int, ...], samples: int, seed: int, kind: Any, peer: Any):
    """Run both on the same values; `peer(x, *parameters)` is PyTorch's layer on tensors laid out as ours."""
    name = word.split(":")[0]
    layer = LAYERS[name](getattr(engine.layer(word), name), shape)
    random = np.random.default_rng(seed)
    values = [random.standard_normal(parameter.shape).astype(kind) for parameter in layer.parameters]
    gradients = [np.full_like(value, np.nan) for value in values]
    layer.attach(values, gradients)
    layer.reserve(samples, kind, in_place=False)
    x = (2 * random.standard_normal((samples, *shape))).astype(kind)
    dy = random.standard_normal((samples, *layer.output_shape)).astype(kind)

    tensors = [torch.tensor(array, requires_grad=True) for array in (x, *values)]
    expected = peer(*tensors)
    expected.backward(torch.tensor(dy))
    ours = [layer.forward(x).copy()]
    layer.backward_parameters(dy)
    ours += [layer.backward_input(dy.copy()), *gradients]
    theirs = [expected.detach(), *(tensor.grad for tensor in tensors)]
    shown = f"{name} (Winograd)" if getattr(layer, "is_winograd", False) else name
    whats = [OUTPUT, INPUT_GRADIENT, *[PARAMETER_GRADIENTS] * len(values)]
    for what, our, their in zip(whats, ours, theirs, strict=True):
        hold(shown, what, our, their.numpy(), TOLERANCE[kind])


def pad_for(size: int, window: int, stride: int, padding: str) -> tuple[int, int]:
    """What `same` adds in front and behind, as TensorFlow's documentation has it."""
    if padding == "valid":
        return (0, 0)
    lacking = max(window - stride if size % stride == 0 else window - size % stride, 0)
    return (lacking // 2, lacking - lacking // 2)


@st.composite
def windows(draw: st.DrawFn) -> SimpleNamespace:
    """An image's shape and a window over it."""
    shape = (draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(1, 20)))
    padding = draw(st.sampled_from(["valid", "same"]))
    window = [draw(st.integers(1, size if padding == "valid" else 5)) for size in shape[:2]]
    stride = [draw(st.integers(1, 3)), draw(st.integers(1, 3))]
    down, across = (pad_for(shape[k], window[k], stride[k], padding) for k in (0, 1))
    return SimpleNamespace(shape=shape, window=window, stride=stride, padding=padding, around=(*across, *down))


@pytest.mark.parametrize("word", ACTIVATIONS)
@settings(max_examples=25, deadline=None)
@given(samples=st.integers(1, 6), shape=st.lists(st.integers(1, 9), min_size=1, max_size=3), seed=SEEDS, kind=DTYPES)
def test_activations_equal_torch_s(engine, word, samples, shape, seed, kind):
    compare(engine, word, tuple(shape), samples, seed, kind, ACTIVATIONS[word])


@settings(max_examples=25, deadline=None)
@given(samples=st.integers(1, 6), units=st.integers(1, 30), seed=SEEDS, kind=DTYPES)
def test_softmax_equals_torch_s(engine, samples, units, seed, kind):
    compare(engine, "softmax", (units,), samples, seed, kind, lambda x: functional.softmax(x, dim=1))


@settings(max_examples=40, deadline=None)
@given(
    samples=st.integers(1, 6),
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    units=st.integers(1, 30),
    bias=st.booleans(),
    seed=SEEDS,
    kind=DTYPES,
)
def test_dense_equals_torch_s(engine, samples, shape, units, bias, seed, kind):
    def peer(x, weight, *biases):
        return functional.linear(x.flatten(1), weight.T, *biases)

    compare(engine, f"dense: {{units: {units}, bias: {str(bias).lower()}}}", tuple(shape), samples, seed, kind, peer)


WINOGRAD_SIDES = st.integers(6, 15)
WINOGRAD_CHANNELS = st.integers(32, 40)


@settings(max_examples=20, deadline=None)
@given(
    sides=st.tuples(WINOGRAD_SIDES, WINOGRAD_SIDES),
    channels=WINOGRAD_CHANNELS,
    filters=WINOGRAD_CHANNELS,
    padding=st.sampled_from(["valid", "same"]),
    samples=st.integers(1, 3),
    seed=SEEDS,
    kind=DTYPES,
)
def test_convolution_by_fewer_products_equals_torch_s(engine, sides, channels, filters, padding, samples, seed, kind):
    """Winograd's sums are of 288 products and more, in another order: float32 errs by a little more than elsewhere."""
    more = 2 if padding == "valid" else 0
    shape = (sides[0] + more, sides[1] + more, channels)
    around = 0 if padding == "valid" else 1

    def peer(x, weight, bias):
        y = functional.conv2d(x.permute(0, 3, 1, 2), weight.permute(3, 2, 0, 1), bias, padding=around)
        return y.permute(0, 2, 3, 1)

    word = f"conv2d: {{filters: {filters}, kernel: 3, padding: {padding}}}"
    assert LAYERS["conv2d"](engine.layer(word).conv2d, shape).is_winograd
    compare(engine, word, shape, samples, seed, kind, peer)


@settings(max_examples=100, deadline=None)
@given(w=windows(), filters=st.integers(1, 9), bias=st.booleans(), samples=st.integers(1, 6), seed=SEEDS, kind=DTYPES)
def test_convolution_equals_torch_s(engine, w, filters, bias, samples, seed, kind):
    def peer(x, weight, *biases):
        # Cloned: of permuted tensors with a lone channel, which contiguous() leaves as they are, PyTorch 2.13 has been
        # seen to read the wrong memory.
        padded = functional.pad(x.permute(0, 3, 1, 2), w.around).clone(memory_format=torch.contiguous_format)
        kernels = weight.permute(3, 2, 0, 1).clone(memory_format=torch.contiguous_format)
        y = functional.conv2d(padded, kernels, *biases, stride=w.stride)
        return y.permute(0, 2, 3, 1)

    sizes = f"filters: {filters}, kernel: {w.window}, stride: {w.stride}, padding: {w.padding}"
    word = f"conv2d: {{{sizes}, bias: {str(bias).lower()}}}"
    compare(engine, word, w.shape, samples, seed, kind, peer)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_convolution_of_many_channels_equals_torch_s(engine, kind, padding):
    """As winograd.py does it, on images of an odd and an even side."""

    def peer(x, weight, bias):
        y = functional.conv2d(x.permute(0, 3, 1, 2), weight.permute(3, 2, 0, 1), bias, padding=padding)
        return y.permute(0, 2, 3, 1)

    word = f"conv2d: {{filters: 40, kernel: 3, padding: {padding}}}"
    compare(engine, word, (13, 16, 32), 7, 1, kind, peer)


@settings(max_examples=60, deadline=None)
@given(w=windows(), samples=st.integers(1, 6), seed=SEEDS, kind=DTYPES)
def test_max_pooling_equals_torch_s(engine, w, samples, seed, kind):
    def peer(x):
        padded = functional.pad(x.permute(0, 3, 1, 2), w.around, value=-torch.inf)
        return functional.max_pool2d(padded, w.window, w.stride).permute(0, 2, 3, 1)

    word = f"max_pool2d: {{size: {w.window}, stride: {w.stride}, padding: {w.padding}}}"
    compare(engine, word, w.shape, samples, seed, kind, peer)


@settings(max_examples=60, deadline=None)
@given(w=windows(), samples=st.integers(1, 6), seed=SEEDS, kind=DTYPES)
def test_average_pooling_equals_torch_s(engine, w, samples, seed, kind):
    def peer(x):
        inside = functional.pad(torch.ones_like(x).permute(0, 3, 1, 2), w.around)
        padded = functional.pad(x.permute(0, 3, 1, 2), w.around)
        means = [functional.avg_pool2d(values, w.window, w.stride) for values in (padded, inside)]
        return (means[0] / means[1]).permute(0, 2, 3, 1)

    word = f"average_pool2d: {{size: {w.window}, stride: {w.stride}, padding: {w.padding}}}"
    compare(engine, word, w.shape, samples, seed, kind, peer)


@settings(max_examples=25, deadline=None)
@given(w=windows(), samples=st.integers(1, 6), seed=SEEDS, kind=DTYPES)
def test_global_average_pooling_equals_torch_s(engine, w, samples, seed, kind):
    compare(engine, "global_average_pool", w.shape, samples, seed, kind, lambda x: x.mean(dim=(1, 2)))


@settings(max_examples=25, deadline=None)
@given(inputs=st.integers(1, 20), units=st.integers(1, 9), samples=st.integers(1, 6), seed=SEEDS, kind=DTYPES)
def test_a_dense_layer_without_bias_equals_torch_s(engine, inputs, units, samples, seed, kind):
    word = f"dense: {{units: {units}, bias: false}}"
    compare(engine, word, (inputs,), samples, seed, kind, lambda x, weight: x @ weight)
