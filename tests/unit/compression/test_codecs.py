"""Wire formats over drawn arrays: how far what comes back is from what was sent, and what must come back exactly."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from protos import job_pb2
from worker.compression import FORMATS, make_codec
from worker.compression.codec import BLOCK_ELEMENTS, decode, encode, encode_with_feedback, encoded_bytes
from worker.compression.floats import FLOAT16_MAX
from worker.compression.int8 import ROW, SMALLEST
from worker.compression.sign import ROW as SIGN_ROW

FRACTION = 0.1
# Around the widths of rows and blocks; what lies between is like one of these.
LENGTHS = (0, 1, 7, 1023, 1024, 1025, 5 * SIGN_ROW + 9, BLOCK_ELEMENTS, BLOCK_ELEMENTS + 1, 2 * BLOCK_ELEMENTS + 4097)
KINDS = tuple(FORMATS)


def codec_of(kind: str):
    wire_format = job_pb2.WireFormat()
    getattr(wire_format, kind).SetInParent()
    if kind == "top_k":
        wire_format.top_k.fraction = FRACTION
    return make_codec(wire_format)


CODECS = {kind: codec_of(kind) for kind in KINDS}


def there_and_back(kind: str, values: np.ndarray) -> np.ndarray:
    codec = CODECS[kind]
    encoded = np.full(encoded_bytes(codec, len(values)), 0xAA, np.uint8)
    before = values.copy()
    encode(codec, values, encoded)
    np.testing.assert_array_equal(before.view(np.uint32), values.view(np.uint32), err_msg="encoding changed its input")
    out = np.full(len(values), 9, np.float32)
    decode(codec, encoded, out)
    return out


def largest_of_rows(values: np.ndarray, width: int) -> np.ndarray:
    """For each element, the largest magnitude of its row."""
    starts = np.arange(0, len(values), width)
    return np.repeat(np.maximum.reduceat(np.abs(values), starts), np.diff([*starts, len(values)]))


def arrays(largest: float) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float32, st.integers(1, 3000), elements=st.floats(-largest, largest, width=32))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_arrays_of_any_length_come_back_near(kind: str, length: int) -> None:
    values = np.random.default_rng(length).standard_normal(length).astype(np.float32)
    lost = values - there_and_back(kind, values)
    bound = {"float32": 0, "float16": 5e-4, "bfloat16": 4e-3, "int8": 0.02, "sign": 0.65, "top_k": 0.85}[kind]
    if length > 100:
        assert np.linalg.norm(lost) <= bound * np.linalg.norm(values)
    assert np.linalg.norm(lost) <= np.linalg.norm(values)  # none is worse than sending nothing


@settings(max_examples=40, deadline=None)
@given(arrays(float(np.float32(3.2e38))))
def test_each_format_keeps_its_bound(values: np.ndarray) -> None:
    exact = values.astype(np.float64)
    np.testing.assert_array_equal(there_and_back("float32", values), values)
    within = exact.clip(-float(FLOAT16_MAX), float(FLOAT16_MAX))
    assert (np.abs(there_and_back("float16", values) - within) <= np.abs(within) * 2.0**-11 + 2.0**-25).all()
    assert (np.abs(there_and_back("bfloat16", values) - exact) <= np.abs(exact) * 2.0**-8 + 2.0**-134).all()
    step = largest_of_rows(exact, ROW) / 127
    assert (np.abs(there_and_back("int8", values) - exact) <= step * (0.5 + 1e-4) + float(SMALLEST)).all()
    kept = there_and_back("top_k", values)
    sent = kept != 0
    assert sent.sum() <= math.ceil(FRACTION * len(values))
    np.testing.assert_array_equal(kept[sent], values[sent])
    if sent.any() and not sent.all():
        assert np.abs(values[sent]).min() >= np.abs(values[~sent]).max()
    kept = there_and_back("sign", values)
    np.testing.assert_array_equal(kept[kept != 0] > 0, (values >= 0)[kept != 0])
    assert (np.abs(kept) <= largest_of_rows(np.abs(values), SIGN_ROW) * (1 + 1e-6)).all()


@pytest.mark.parametrize("nonzero", [0, 1, 99, 100, 101, 700, 1000])  # 100 of 1000 are sent
def test_the_largest_of_a_block_are_sent_however_many_are_0_and_the_first_of_equals(nonzero: int) -> None:
    random = np.random.default_rng(nonzero)
    values = np.zeros(1000, np.float32)
    values[random.permutation(1000)[:nonzero]] = random.choice([-3, -2, -1, 1, 2, 3], nonzero)
    sent = np.argsort(-np.abs(values), kind="stable")[:100]
    wanted = np.zeros_like(values)
    wanted[sent] = values[sent]
    np.testing.assert_array_equal(there_and_back("top_k", values), wanted)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**32 - 1))
def test_what_a_format_can_say_comes_back_exactly(length: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    halves = (
        random.integers(0, 0x7C00, length).astype(np.uint16) | random.integers(0, 2, length).astype(np.uint16) << 15
    )
    uppers = (
        random.integers(0, 0x7F80, length).astype(np.uint32) | random.integers(0, 2, length).astype(np.uint32) << 15
    )
    whole = random.integers(-127, 128, length).astype(np.float32)
    whole[::ROW] = 127
    few = np.zeros(length, np.float32)
    few[random.choice(length, math.ceil(FRACTION * length), replace=False)] = 3.7
    two = np.where(random.integers(0, 2, length) == 0, np.float32(0.3), np.float32(-1.7))
    for kind, values in {
        "float32": random.integers(0, 0x7F800000, length).astype(np.uint32).view(np.float32),
        "float16": halves.view(np.float16).astype(np.float32),
        "bfloat16": (uppers << 16).view(np.float32),
        "int8": whole * np.float32(0.25),
        "top_k": few,
        "sign": two,
    }.items():
        np.testing.assert_array_equal(there_and_back(kind, values), values, err_msg=kind)


def test_16_bits_round_to_nearest_and_ties_to_even() -> None:
    def bfloat16(bits: int) -> int:
        return int(there_and_back("bfloat16", np.array([bits], np.uint32).view(np.float32)).view(np.uint32)[0]) >> 16

    assert [bfloat16(bits) for bits in (0x3F808000, 0x3F818000, 0x3F808001, 0x3F817FFF)] == [
        0x3F80, 0x3F82, 0x3F81, 0x3F81,
    ]  # fmt: skip
    # 2049 and 2051 lie midway between float16's even numbers.
    assert there_and_back("float16", np.array([2049, 2051], np.float32)).tolist() == [2048, 2052]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stray", [np.nan, np.inf, -np.inf, np.array([0xFFFFFFFF], np.uint32).view(np.float32)[0]])
def test_what_is_not_finite_stays_so(kind: str, stray: float) -> None:
    values = np.linspace(-3, 3, 5000, dtype=np.float32)
    values[77] = stray
    assert not np.isfinite(there_and_back(kind, values)[77])


@pytest.mark.parametrize("kind", KINDS)
def test_finite_values_stay_so(kind: str) -> None:
    values = np.full(5000, np.finfo(np.float32).max)
    values[::2] *= -1
    assert np.isfinite(there_and_back(kind, values)).all()


def test_float16_has_the_bits_of_numpys_own_conversion() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16)
    finite = halves[(halves & 0x7FFF) < 0x7C00]
    numbers = finite.view(np.float16).astype(np.float32)
    between = ((numbers[1:].astype(np.float64) + numbers[:-1]) / 2).astype(np.float32)  # ties, exactly
    random = np.random.default_rng(0).integers(0, 0x477FE000, 1 << 17, dtype=np.uint32).view(np.float32)
    for values in (numbers, between[np.abs(between) < 65504], random, -random):
        encoded = np.empty(2 * len(values), np.uint8)
        encode(CODECS["float16"], values, encoded)
        with np.errstate(under="ignore"):
            np.testing.assert_array_equal(encoded.view(np.uint16), values.astype(np.float16).view(np.uint16))
    for of in (finite, halves):  # the latter not all finite
        decoded = np.empty(len(of), np.float32)
        decode(CODECS["float16"], of.view(np.uint8), decoded)
        wanted = of.view(np.float16).astype(np.float32)
        np.testing.assert_array_equal(decoded.view(np.uint32), wanted.view(np.uint32))


def test_a_truncated_or_hostile_block_is_refused() -> None:
    for kind, codec in CODECS.items():
        with pytest.raises(ValueError, match=f"1000 elements take {codec.size(1000)}"):
            decode(codec, np.zeros(codec.size(1000) - 1, np.uint8), np.zeros(1000, np.float32))
        assert kind
    with pytest.raises(ValueError, match="index 65535 lies outside a block of 1000"):
        decode(CODECS["top_k"], np.full(600, 255, np.uint8), np.zeros(1000, np.float32))
    repeated = np.zeros(600, np.uint8)
    repeated[400:].view(np.uint16)[:] = [*range(50), *range(49, 99)]
    with pytest.raises(ValueError, match="index 49 follows 49: they must rise"):
        decode(CODECS["top_k"], repeated, np.zeros(1000, np.float32))


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(KINDS), st.sampled_from(LENGTHS[1:8]), st.integers(0, 2**32 - 1), st.sampled_from([1.0, 1e6]))
def test_error_feedback_loses_nothing(kind: str, length: int, seed: int, size: float) -> None:
    """What was sent and the residual add up to what was to be sent; the residual does not grow without bound."""
    random = np.random.default_rng(seed)
    codec, residual, scratch = CODECS[kind], np.zeros(length, np.float32), np.empty(length, np.float32)
    encoded, decoded = np.empty(encoded_bytes(codec, length), np.uint8), np.empty(length, np.float32)
    wanted, sent, largest = np.zeros(length), np.zeros(length), 0.0
    for _ in range(12):
        gradient = (size * random.standard_normal(length)).astype(np.float32)
        encode_with_feedback(codec, gradient, np.float32(0.5), residual, encoded, scratch)
        decode(codec, encoded, decoded)
        wanted += gradient.astype(np.float64) / 2
        sent += decoded
        largest = max(largest, float(np.abs(gradient).max()))
    np.testing.assert_allclose(sent + residual, wanted, rtol=0, atol=1e-5 * 12 * largest)


def test_float16_leaves_what_it_cannot_say_for_the_next_step() -> None:
    codec, residual = CODECS["float16"], np.zeros(1, np.float32)
    encoded, scratch, sent = np.empty(2, np.uint8), np.empty(1, np.float32), []
    for value in (200_000, 0, 0, 0):
        encode_with_feedback(codec, np.array([value], np.float32), np.float32(1), residual, encoded, scratch)
        sent.append(float(encoded.view(np.float16)[0]))
    assert sent == [65504, 65504, 65504, 200_000 - 3 * 65504]
