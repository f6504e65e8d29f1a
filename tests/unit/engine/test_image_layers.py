"""Layers on images: gradients against differences, slices against one slice, faults by name, initial weights."""

import re
import tracemalloc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.engine import chain
from worker.engine.layers import LAYERS, conv2d, patches, pooling, winograd
from worker.engine.layers import tiles as tiles_module
from worker.engine.layers.window import pair
from worker.engine.model import Model
from worker.errors import ModelFault

LOSS = "softmax_cross_entropy"
NETWORK = [
    "conv2d: {filters: 5, kernel: 3, padding: same}",
    "max_pool2d: {size: 2}",
    "relu",
    "conv2d: {filters: 4, kernel: [2, 3], stride: [1, 2], bias: false}",
    "gelu",
    "average_pool2d: {size: 2, stride: 1, padding: same}",
    "flatten",
    "dense:3",
]


@st.composite
def layers(draw: st.DrawFn, kind: str) -> tuple[str, tuple[int, int, int]]:
    """A layer as a job file has it, and images that it fits."""
    shape = (draw(st.integers(1, 8)), draw(st.integers(1, 8)), draw(st.integers(1, 5)))
    padding = draw(st.sampled_from(["valid", "same"]))
    window = [draw(st.integers(1, size if padding == "valid" else 4)) for size in shape[:2]]
    stride = [draw(st.integers(1, 4)), draw(st.integers(1, 4))]
    if kind == "global_average_pool":
        return kind, shape
    if kind == "conv2d":
        bias = draw(st.sampled_from(["true", "false"]))
        sizes = f"filters: {draw(st.integers(1, 5))}, kernel: {window}, bias: {bias}"
    else:
        sizes = f"size: {window}"
    return f"{kind}: {{{sizes}, stride: {stride}, padding: {padding}}}", shape


def made(engine: SimpleNamespace, word: str, shape: tuple[int, ...], samples: int, seed: int) -> SimpleNamespace:
    """A layer with random parameters, an input and a gradient of its output, in float64."""
    kind = word.split(":")[0]
    layer = LAYERS[kind](getattr(engine.layer(word), kind), shape)
    random = np.random.default_rng(seed)
    values = [random.standard_normal(parameter.shape) for parameter in layer.parameters]
    gradients = [np.full_like(value, np.nan) for value in values]
    layer.attach(values, gradients)
    layer.reserve(samples, np.float64, in_place=False)
    x = random.standard_normal((samples, *shape))
    dy = random.standard_normal((samples, *layer.output_shape))
    return SimpleNamespace(layer=layer, values=values, gradients=gradients, x=x, dy=dy, random=random)


@pytest.mark.parametrize("kind", ["conv2d", "max_pool2d", "average_pool2d", "global_average_pool"])
@settings(max_examples=60, deadline=None)
@given(data=st.data(), samples=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_gradients_equal_the_difference_whatever_the_shape(
    engine: Any, difference: Callable[..., float], kind: str, data: st.DataObject, samples: int, seed: int
) -> None:
    word, shape = data.draw(layers(kind))
    case = made(engine, word, shape, samples, seed)
    case.layer.forward(case.x)
    case.layer.backward_parameters(case.dy)
    dx = case.layer.backward_input(case.dy.copy()).copy()
    assert dx.shape == case.x.shape
    for point, gradient in zip([case.x, *case.values], [dx, *case.gradients], strict=True):
        direction = case.random.standard_normal(point.shape)
        numeric = difference(lambda: float(np.sum(case.layer.forward(case.x) * case.dy)), point, direction)
        assert np.sum(gradient * direction) == pytest.approx(numeric, rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("kind", ["conv2d", "max_pool2d", "average_pool2d"])
@settings(max_examples=40, deadline=None)
@given(data=st.data(), samples=st.integers(1, 5), seed=st.integers(0, 2**32 - 1), limit=st.integers(1, 6000))
def test_the_size_of_a_slice_changes_nothing(
    engine: Any, kind: str, data: st.DataObject, samples: int, seed: int, limit: int
) -> None:
    """Down to one row of one image at a time, as large images are worked through."""
    word, shape = data.draw(layers(kind))
    results = []
    for slice_bytes in (2**30, limit):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(conv2d, "SLICE_BYTES", slice_bytes)
            patch.setattr(pooling, "SLICE_BYTES", slice_bytes)
            case = made(engine, word, shape, samples, seed)
        y = case.layer.forward(case.x)
        case.layer.backward_parameters(case.dy)
        results.append([y, case.layer.backward_input(case.dy), *case.gradients])
    for whole, sliced in zip(*results, strict=True):
        np.testing.assert_allclose(sliced, whole, rtol=1e-10, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), samples=st.integers(1, 5), seed=st.integers(0, 2**32 - 1), limit=st.integers(1, 20000))
def test_fewer_products_make_the_same_convolution(
    engine: Any, data: st.DataObject, samples: int, seed: int, limit: int
) -> None:
    """Winograd's against the unfolded one, in slices of any size, and on a smaller batch than the one before."""
    padding = data.draw(st.sampled_from(["valid", "same"]))
    least = 3 if padding == "valid" else 1
    shape = tuple(data.draw(st.tuples(st.integers(least, 9), st.integers(least, 9), st.integers(1, 4))))
    word = f"conv2d: {{filters: {data.draw(st.integers(1, 4))}, kernel: 3, padding: {padding}}}"
    results = []
    for channels in (1, 10**6):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(winograd, "LEAST_CHANNELS", channels)
            patch.setattr(winograd, "LEAST_PIXELS", 1)
            patch.setattr(winograd, "SLICE_BYTES", limit)
            case = made(engine, word, shape, samples, seed)
        assert case.layer.is_winograd == (channels == 1)
        arrays = []
        for count in (samples, samples // 2, samples):
            arrays.append(case.layer.forward(case.x[:count]).copy())
            case.layer.backward_parameters(case.dy[:count])
            arrays += [case.layer.backward_input(case.dy[:count].copy()).copy()]
            arrays += [gradient.copy() for gradient in case.gradients]
        results.append(arrays)
    for fewer, unfolded in zip(*results, strict=True):
        np.testing.assert_allclose(fewer, unfolded, rtol=1e-10, atol=1e-11)


def test_of_equal_values_in_a_window_the_first_takes_the_gradient(engine: Any) -> None:
    case = made(engine, "max_pool2d: {size: 2}", (2, 2, 1), 1, 0)
    case.layer.forward(np.array([1.0, 3, 3, 3]).reshape(1, 2, 2, 1))
    assert case.layer.backward_input(np.full((1, 1, 1, 1), 5.0)).ravel().tolist() == [0, 5, 0, 0]


@pytest.mark.parametrize("pool", ["{size: 2}", "{size: 3, stride: 2, padding: same}", "{size: [1, 2], stride: [2, 3]}"])
def test_relu_run_behind_the_pooling_changes_nothing(engine: Any, pool: str) -> None:
    """Also where all of a window is 0 behind ReLU, and where its largest values are equal."""
    words = ["conv2d: {filters: 3, kernel: 3}", "relu", f"max_pool2d: {pool}", "relu", "relu", "dense:3"]
    results = []
    for as_written in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if as_written:
                patch.setattr(chain, "run_order", lambda layers: list(range(len(layers))))
            case = engine.build(words, LOSS, (9, 10, 2))
        case.parameters[...] = np.round(case.parameters * 3)
        features, labels = engine.draw_batch(case.model, 6, 5)
        loss = case.model.forward(np.round(features), labels).loss
        case.model.backward()
        results.append((loss, case.gradient))
        assert [placed.place for placed in case.model.layers[:3]] == ["0.conv2d", "1.relu", "2.max_pool2d"]
    assert results[0][0] == results[1][0]
    np.testing.assert_array_equal(results[0][1], results[1][1])


@pytest.mark.parametrize("pool", ["max_pool2d", "average_pool2d"])
@settings(max_examples=40, deadline=None)
@given(
    tile=st.sampled_from([(2, 2), (2, 2), (3, 1), (1, 2), (3, 3)]),
    tiles=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    channels=st.sampled_from([1, 3, 32]),
    kernel=st.sampled_from([1, 2, 3, 3, 5]),
    stride=st.sampled_from([1, 1, 2]),
    samples=st.integers(1, 5),
    slice_bytes=st.sampled_from([1 << 14, 1 << 18, 1 << 20]),
    bias=st.sampled_from(["true", "false"]),
)
def test_maps_laid_out_for_the_pooling_behind_give_the_same_gradient(
    engine: Any, pool: str, tile: Any, tiles: Any, channels: int, kernel: int, stride: int, samples: int,
    slice_bytes: int, bias: str,
) -> None:  # fmt: skip
    """In front of it stands another convolution, so that the input's gradient counts too.

    Winograd's is among them, and so is the one whose patches are unfolded.
    """
    shape = (stride * tile[0] * tiles[0], stride * tile[1] * tiles[1], 2)
    options = f"kernel: {kernel}, padding: same, bias: {bias}"
    words = [
        f"conv2d: {{filters: {channels}, {options}}}",
        f"conv2d: {{filters: 32, stride: {stride}, {options}}}",
        f"{pool}: {{size: [{tile[0]}, {tile[1]}]}}",
        "dense:3",
    ]
    results = []
    for joined in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            for module in (conv2d, patches, winograd):
                patch.setattr(module, "SLICE_BYTES", slice_bytes)
            if not joined:
                patch.setattr(tiles_module, "join", lambda before, behind: None)
            case = engine.build(words, LOSS, shape)
            features, labels = engine.draw_batch(case.model, samples, 5)
            for count in (samples, 0, samples):
                loss = case.model.forward(features[:count], labels[:count]).loss
                case.model.backward()
        results.append((loss, case.gradient))
    (loss, gradient), (expected_loss, expected) = results
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-10)


def test_a_large_image_is_not_laid_out_for_its_pooling(engine: Any) -> None:
    """Its slices are rows, and tiles would make them the whole image."""
    for side, laid_out in ((16, True), (400, False)):
        words = ["conv2d: {filters: 1, kernel: 5, padding: same}", "max_pool2d: {size: 2}", "dense:2"]
        convolution, pooled = (placed.layer for placed in engine.build(words, LOSS, (side, side, 1)).model.layers[:2])
        assert (convolution.tile is not None) == pooled.takes_tiles == laid_out


def test_a_network_of_images_learns_by_the_difference_and_leaves_its_features_alone(
    engine: Any, difference: Callable[..., float]
) -> None:
    case = engine.build(NETWORK, LOSS, (7, 9, 2))
    features, labels = engine.draw_batch(case.model, 4, 5)
    kept = features.copy()
    direction = np.random.default_rng(6).standard_normal(case.model.parameter_count)
    for samples in (4, 2, 4):  # a smaller batch in between leaves nothing behind
        case.model.forward(features[:samples], labels[:samples])
        case.model.backward()
    numeric = difference(lambda: case.model.forward(features, labels).loss, case.parameters, direction)
    assert case.gradient @ direction == pytest.approx(numeric, rel=1e-5, abs=1e-8)
    np.testing.assert_array_equal(features, kept)


def test_flatten_hands_on_memory_that_nothing_writes_over(engine: Any, difference: Callable[..., float]) -> None:
    case = engine.build(["flatten", "tanh", "dense:4", "sigmoid", "flatten", "tanh", "dense:3"], LOSS, (2, 3, 1))
    features, labels = engine.draw_batch(case.model, 4, 5)
    kept = features.copy()
    direction = np.random.default_rng(6).standard_normal(case.model.parameter_count)
    case.model.forward(features, labels)
    case.model.backward()
    numeric = difference(lambda: case.model.forward(features, labels).loss, case.parameters, direction)
    assert case.gradient @ direction == pytest.approx(numeric, rel=1e-5, abs=1e-8)
    np.testing.assert_array_equal(features, kept)


def test_maps_that_are_pooled_slice_by_slice_never_exist_for_a_whole_batch(engine: Any) -> None:
    """Whether patches are unfolded (3 x 3 of one channel), windows (5 x 5 of 16) or Winograd's products (of 32)."""
    for channels, kernel, own in ((1, 3, "patches"), (16, 5, ""), (32, 3, "winograd")):
        words = [f"conv2d: {{filters: 64, kernel: {kernel}, padding: same}}", "max_pool2d: {size: 2}", "dense:3"]
        model = engine.build(words, LOSS, (14, 14, channels), np.float32).model
        model.reserve(256)
        convolution, pooled = (placed.layer for placed in model.layers[:2])
        assert convolution.pooling is pooled
        assert pooled.dx.nbytes == convolution.handed_on.nbytes == 0
        holders = [vars(convolution), vars(pooled), vars(getattr(convolution, own)) if own else {}]
        kept = {"dx", "seen", "padded"}  # of the input's size; `seen` is a view of `padded` or what products read
        largest = max(
            array.nbytes
            for holder in holders
            for name, array in holder.items()
            if isinstance(array, np.ndarray) and name not in kept
        )
        assert largest < 256 * 14 * 14 * 64 * 4 / 3


def test_a_step_on_images_allocates_nothing_big(engine: Any) -> None:
    words = ["conv2d: {filters: 32, kernel: 3, padding: same}", "silu", "max_pool2d: {size: 2}"]
    words += ["conv2d: {filters: 32, kernel: 3, padding: same}", *NETWORK[3:]]
    case = engine.build(words, LOSS, (28, 28, 1), np.float32)
    case.model.reserve(64)
    features, labels = engine.draw_batch(case.model, 64, 1)
    case.model.forward(features, labels)
    case.model.backward()
    tracemalloc.start()
    case.model.forward(features, labels)
    case.model.backward()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000  # the first layer's output alone is 6.4 MB; NumPy's own buffers for strided views are 96 KB


@pytest.mark.parametrize(
    ("words", "shape", "message"),
    [
        (["conv2d: {filters: 2, kernel: 3}"], (784,), "model[0].conv2d: got samples of shape (784,), needs images"),
        (
            ["conv2d: {filters: 2, kernel: [5, 2]}"],
            (4, 6, 1),
            "model[0].conv2d: kernel: 5 x 2 is larger than its image, got samples of shape (4, 6, 1); "
            "needs at most 4 x 6, or padding: same",
        ),
        (["max_pool2d: {size: 2}", "max_pool2d: {size: 3}"], (4, 4, 1), "model[1].max_pool2d: size: 3 x 3 is larger"),
        (
            ["dense:4", "global_average_pool"],
            (4, 4, 1),
            "model[1].global_average_pool: got samples of shape (4,), needs",
        ),
        (["conv2d: {filters: 2, kernel: 3}"], (4, 4, 1), "loss.softmax_cross_entropy: got outputs of shape (2, 2, 2)"),
    ],
)
def test_what_does_not_fit_is_named_with_what_it_got_and_needs(
    engine: Any, words: list[str], shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ModelFault, match=re.escape(message)):
        Model([engine.layer(word) for word in words], engine.loss_message(LOSS), shape)


@pytest.mark.parametrize("values", [[], [0], [3, 3, 3]])
def test_what_is_no_pair_is_refused_where_no_rule_was_asked(values: list[int]) -> None:
    with pytest.raises(ModelFault, match=re.escape(f"kernel: {values} is not one number for both directions, or two")):
        pair("kernel", values)


def test_weights_are_drawn_for_the_rectifier_they_reach_and_by_the_fans_of_a_convolution(engine: Any) -> None:
    words = ["conv2d: {filters: 64, kernel: 5}", "max_pool2d: {size: 2}", "relu", "conv2d: {filters: 64, kernel: 3}"]
    case = engine.build([*words, "tanh", "flatten", "dense:2"], LOSS, (16, 16, 32), np.float32)
    case.model.initialize(3)
    named = case.model.named_parameters()
    assert named["0.conv2d.weight"].shape == (5, 5, 32, 64)
    assert named["0.conv2d.weight"].std() == pytest.approx(np.sqrt(2 / (25 * 32)), rel=0.02)
    assert named["3.conv2d.weight"].std() == pytest.approx(np.sqrt(2 / (9 * 64 + 9 * 64)), rel=0.02)
    assert not named["0.conv2d.bias"].any()


def test_a_layer_without_a_bias_has_one_parameter(engine: Any) -> None:
    words = ["conv2d: {filters: 2, kernel: 3, bias: false}", "dense: {units: 3, bias: false}"]
    model = engine.build(words, LOSS, (4, 4, 1)).model
    assert [slot.name for slot in model.slots] == ["0.conv2d.weight", "1.dense.weight"]
