"""Each layer of sequences and deep networks against PyTorch's own: output, input gradient, parameter gradients."""

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
SEEDS = st.integers(0, 2**32 - 1)


def compare(kind, options, x, module, parameters, tolerance=1e-11, dtype=np.float64):
    """Run both on x and on a random dL/dy. `parameters` turns the layer's arrays into the module's, and gradients too.

    The differences are held to `tolerance` of the largest value, or of 1, in `dtype`: rounding alone is left.
    """
    module = module.to(torch.float32 if dtype == np.float32 else torch.float64)
    x = x if kind == "embedding" else x.astype(dtype)
    random = np.random.default_rng(5)
    layer = LAYERS[kind](options, x.shape[1:])
    values = [random.standard_normal(parameter.shape).astype(dtype) for parameter in layer.parameters]
    gradients = [np.full_like(value, np.nan) for value in values]
    layer.attach(values, gradients)
    layer.reserve(len(x), dtype, in_place=False)
    with torch.no_grad():
        for name, array in parameters(values).items():
            module.get_parameter(name).copy_(torch.tensor(array))
    whole_numbers = kind == "embedding"
    theirs_x = torch.tensor(x, dtype=torch.int64) if whole_numbers else torch.tensor(x, requires_grad=True)
    theirs = module(theirs_x)
    ours = layer.forward(x.astype(dtype))
    hold(kind, OUTPUT, ours, theirs.detach().numpy(), tolerance)
    dy = random.standard_normal(ours.shape).astype(dtype)
    theirs.backward(torch.tensor(dy))
    layer.backward_parameters(dy)
    if not whole_numbers:
        hold(kind, INPUT_GRADIENT, layer.backward_input(dy), theirs_x.grad.numpy(), tolerance)
    for name, gradient in parameters(gradients).items():
        hold(kind, PARAMETER_GRADIENTS, gradient, module.get_parameter(name).grad.numpy(), tolerance)


@settings(max_examples=25, deadline=None)
@given(samples=SIZES, lead=st.lists(SIZES, max_size=2), units=st.integers(2, 9), seed=SEEDS)
def test_layer_norm_equals_torch_s(samples, lead, units, seed):
    x = np.random.default_rng(seed).standard_normal((samples, *lead, units))
    module = torch.nn.LayerNorm(units, eps=1e-5, dtype=torch.float64)
    options = job_pb2.LayerNormLayer(epsilon=1e-5)
    compare("layer_norm", options, x, module, lambda arrays: dict(zip(("weight", "bias"), arrays, strict=True)))


@settings(max_examples=25, deadline=None)
@given(samples=SIZES, lead=st.lists(SIZES, max_size=2), inputs=SIZES, units=SIZES, seed=SEEDS)
def test_linear_equals_torch_s(samples, lead, inputs, units, seed):
    x = np.random.default_rng(seed).standard_normal((samples, *lead, inputs))
    module = torch.nn.Linear(inputs, units, dtype=torch.float64)
    options = job_pb2.LinearLayer(units=units)
    compare("linear", options, x, module, lambda arrays: {"weight": arrays[0].T, "bias": arrays[1]})


@settings(max_examples=25, deadline=None)
@given(samples=SIZES, tokens=SIZES, vocabulary=SIZES, units=SIZES, seed=SEEDS)
def test_embedding_equals_torch_s(samples, tokens, vocabulary, units, seed):
    x = np.random.default_rng(seed).integers(0, vocabulary, (samples, tokens))
    module = torch.nn.Embedding(vocabulary, units, dtype=torch.float64)
    options = job_pb2.EmbeddingLayer(vocabulary=vocabulary, units=units)
    compare("embedding", options, x, module, lambda arrays: {"weight": arrays[0]})


class TorchAttention(torch.nn.Module):
    """torch.nn.MultiheadAttention of a sequence with itself."""

    def __init__(self, features, heads, causal):
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(features, heads, batch_first=True, dtype=torch.float64)
        self.causal = causal

    def forward(self, x):
        mask = torch.triu(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool), 1) if self.causal else None
        return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]


@pytest.mark.parametrize("causal", [False, True])
@settings(max_examples=25, deadline=None)
@given(
    samples=SIZES,
    time=SIZES | st.integers(31, 70),  # a block of queries is 32
    heads=st.integers(1, 4),
    width=st.integers(1, 5),
    scale=st.sampled_from([1, 8]),  # with 8, scores too large for their exponentials as they are
    seed=SEEDS,
)
def test_attention_equals_torch_s(causal, samples, time, heads, width, scale, seed):
    x = scale * np.random.default_rng(seed).standard_normal((samples, time, heads * width))
    compare(
        "attention",
        job_pb2.AttentionLayer(heads=heads, causal=causal),
        x,
        TorchAttention(heads * width, heads, causal),
        lambda arrays: {
            "attention.in_proj_weight": arrays[0].T,
            "attention.in_proj_bias": arrays[1],
            "attention.out_proj.weight": arrays[2].T,
            "attention.out_proj.bias": arrays[3],
        },
        tolerance=1e-11 * scale**4,  # as gradients grow with x, and the scores within them with its square
    )


class TorchPositions(torch.nn.Module):
    """x + a row for each position."""

    def __init__(self, shape):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(shape, dtype=torch.float64))

    def forward(self, x):
        return x + self.weight


@settings(max_examples=15, deadline=None)
@given(samples=SIZES, time=SIZES, features=SIZES, seed=SEEDS)
def test_positions_equal_torch_s(samples, time, features, seed):
    x = np.random.default_rng(seed).standard_normal((samples, time, features))
    compare("positions", job_pb2.PositionsLayer(), x, TorchPositions((time, features)), lambda a: {"weight": a[0]})


WIDTHS = st.integers(2, 6).map(lambda n: 4 * n)
FLOAT32 = 1e-4  # float32's 6e-8, over sums of some hundred and a division by a deviation that may be small


@settings(max_examples=25, deadline=None)
@given(samples=SIZES, time=st.integers(1, 40), width=WIDTHS, causal=st.booleans(), seed=SEEDS)
def test_layers_of_sequences_in_float32_equal_torch_s(samples, time, width, causal, seed):
    x = np.random.default_rng(seed).standard_normal((samples, time, width))
    in_order = [f"attention.{part}_{name}" for part, name in (("in_proj", "weight"), ("in_proj", "bias"))]
    in_order += [f"attention.out_proj.{name}" for name in ("weight", "bias")]
    for kind, options, module, names in (
        ("layer_norm", job_pb2.LayerNormLayer(epsilon=1e-5), torch.nn.LayerNorm(width), ("weight", "bias")),
        ("linear", job_pb2.LinearLayer(units=7), torch.nn.Linear(width, 7), ("weight", "bias")),
        ("attention", job_pb2.AttentionLayer(heads=4, causal=causal), TorchAttention(width, 4, causal), in_order),
    ):
        compare(
            *(kind, options, x, module),
            lambda arrays, names=names: {name: array.T for name, array in zip(names, arrays, strict=True)},
            *(FLOAT32, np.float32),
        )
    module = TorchPositions((time, width))
    compare("positions", job_pb2.PositionsLayer(), x, module, lambda arrays: {"weight": arrays[0]}, FLOAT32, np.float32)


@settings(max_examples=15, deadline=None)
@given(samples=SIZES, tokens=SIZES, vocabulary=SIZES, units=SIZES, seed=SEEDS)
def test_embedding_in_float32_equals_torch_s(samples, tokens, vocabulary, units, seed):
    x = np.random.default_rng(seed).integers(0, vocabulary, (samples, tokens))
    options = job_pb2.EmbeddingLayer(vocabulary=vocabulary, units=units)
    module = torch.nn.Embedding(vocabulary, units)
    compare("embedding", options, x, module, lambda arrays: {"weight": arrays[0]}, FLOAT32, np.float32)


class TorchResidual(torch.nn.Module):
    """x + F(x)."""

    def __init__(self, *inside):
        super().__init__()
        self.inside = torch.nn.Sequential(*inside)

    def forward(self, x):
        return x + self.inside(x)


@settings(max_examples=25, deadline=None)
@given(samples=SIZES, time=SIZES, features=st.integers(2, 6), width=SIZES, seed=SEEDS)
def test_residual_equals_torch_s(samples, time, features, width, seed):
    x = np.random.default_rng(seed).standard_normal((samples, time, features))
    options = job_pb2.ResidualLayer(
        layers=[
            job_pb2.Layer(layer_norm=job_pb2.LayerNormLayer(epsilon=1e-5)),
            job_pb2.Layer(linear=job_pb2.LinearLayer(units=width)),
            job_pb2.Layer(tanh=job_pb2.TanhLayer()),
            job_pb2.Layer(linear=job_pb2.LinearLayer(units=features)),
        ]
    )
    module = TorchResidual(
        torch.nn.LayerNorm(features, dtype=torch.float64),
        torch.nn.Linear(features, width, dtype=torch.float64),
        torch.nn.Tanh(),
        torch.nn.Linear(width, features, dtype=torch.float64),
    )
    names = [f"inside.{index}.{name}" for index in (0, 1, 3) for name in ("weight", "bias")]
    compare("residual", options, x, module, lambda arrays: dict(zip(names, (a.T for a in arrays), strict=True)))


@settings(max_examples=25, deadline=None)
@given(samples=SIZES, shape=st.lists(SIZES, min_size=1, max_size=3), rate=st.floats(0.01, 0.9), seed=SEEDS)
def test_dropout_under_the_same_mask_equals_torch_s(samples, shape, rate, seed):
    """PyTorch draws other masks; its product with ours, at its own divisor, differs by the rate's rounding alone."""
    x = np.random.default_rng(seed).standard_normal((samples, *shape))
    layer = LAYERS["dropout"](job_pb2.DropoutLayer(rate=rate), tuple(shape))
    layer.reserve(samples, np.float64, in_place=False)
    layer.begin(Moment(seed=seed, step=1, first=0))
    ours = layer.forward(x)
    mask = torch.tensor(layer.factor.reshape(x.shape) > 0)
    theirs_x = torch.tensor(x, requires_grad=True)
    theirs = theirs_x * mask / (1 - rate)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-4)
    dy = np.random.default_rng(seed + 1).standard_normal(x.shape)
    theirs.backward(torch.tensor(dy))
    np.testing.assert_allclose(layer.backward_input(dy), theirs_x.grad.numpy(), rtol=1e-4)
