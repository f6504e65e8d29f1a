"""Holding out, scaling and standardizing, against their definitions and scikit-learn."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.preprocessing import StandardScaler

from protos import job_pb2
from worker.data.preprocessing import Preprocessing, make_preprocessing, mean_and_deviation
from worker.data.sources import Dataset
from worker.data.split import hold_out
from worker.errors import CheckpointFault, DataFault


def dataset(features: np.ndarray, rows: np.ndarray | None = None) -> Dataset:
    return Dataset(features, np.zeros(len(features), np.int64), rows, "here")


@given(samples=st.integers(2, 400), fraction=st.floats(0.001, 0.999), seed=st.integers(0, 2**63 - 1))
def test_held_out_samples_are_disjoint_from_training_and_both_together_are_all(
    samples: int, fraction: float, seed: int
) -> None:
    whole = dataset(np.arange(samples))
    train, validation = hold_out(whole, fraction, seed)
    assert train.rows is not None
    assert validation.rows is not None
    np.testing.assert_array_equal(np.sort(np.concatenate([train.rows, validation.rows])), np.arange(samples))
    assert len(validation) == min(max(round(samples * fraction), 1), samples - 1)
    assert train.features is whole.features
    again = hold_out(whole, fraction, seed)[1].rows
    np.testing.assert_array_equal(again, validation.rows)


def test_another_seed_holds_out_other_samples() -> None:
    whole = dataset(np.arange(1000))
    assert not np.array_equal(hold_out(whole, 0.2, 0)[1].rows, hold_out(whole, 0.2, 1)[1].rows)


def test_holding_out_of_a_view_stays_inside_the_view() -> None:
    view = dataset(np.arange(100), rows=np.arange(50, 100))
    train, validation = hold_out(view, 0.3, 0)
    assert train.rows is not None
    assert validation.rows is not None
    assert sorted([*train.rows, *validation.rows]) == list(range(50, 100))


def test_one_sample_is_too_few_to_hold_any_out() -> None:
    with pytest.raises(DataFault, match="here: holds 1 sample, too few to hold any out; drop validation_fraction"):
        hold_out(dataset(np.arange(1)), 0.5, 0)


@pytest.mark.parametrize("stored", ["u1", "i2", "i4", "f2", "f4", "f8", ">f4", "?"])
def test_standardizing_equals_scikit_learn_for_every_stored_type(stored: str) -> None:
    random = np.random.default_rng(0)
    features = (random.normal(5, 3, (3000, 4, 5)) * 10).clip(0, 200).astype(stored)
    rows = random.permutation(3000)[:2500]
    train = dataset(features, rows)
    reference = StandardScaler().fit(features[rows].reshape(2500, 20).astype(np.float64))
    preprocessing = make_preprocessing(job_pb2.Data(standardize=True), train)
    np.testing.assert_allclose(preprocessing.mean, reference.mean_, rtol=1e-12)
    np.testing.assert_allclose(preprocessing.deviation, reference.scale_, rtol=1e-12)
    out = np.empty((3000, 4, 5, 1), np.float32)
    preprocessing.apply(features, out)
    expected = reference.transform(features.reshape(3000, 20).astype(np.float64))
    np.testing.assert_allclose(out.reshape(3000, 20), expected, rtol=1e-5, atol=2e-6)


def test_mean_and_deviation_over_many_blocks_equal_those_over_the_whole() -> None:
    features = np.random.default_rng(0).normal(1e6, 1.0, (40_000, 60))  # 19 MB, five blocks; mean far above deviation
    mean, deviation = mean_and_deviation(dataset(features))
    exact = [math.fsum(column) / 40_000 for column in features.T]
    np.testing.assert_allclose(mean, exact, rtol=2e-14)
    np.testing.assert_allclose(deviation, features.std(axis=0), rtol=1e-9)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e8 + 0.3, -7.7e-5])
def test_a_constant_feature_is_divided_by_1_and_becomes_0(constant: float) -> None:
    train = dataset(np.full((9_999, 2), constant))
    preprocessing = make_preprocessing(job_pb2.Data(standardize=True), train)
    assert preprocessing.deviation == (1.0, 1.0)
    out = np.empty((5, 2), np.float32)
    preprocessing.apply(train.features[:5], out)
    np.testing.assert_allclose(out, 0, atol=1e-6 * max(1.0, abs(constant) * 1e-6))


def test_times_in_seconds_keep_their_digits() -> None:
    seconds = 1.7e9 + np.arange(100.0).reshape(100, 1)  # float32 steps by 128 there
    out = np.empty((100, 1), np.float32)
    make_preprocessing(job_pb2.Data(standardize=True), dataset(seconds)).apply(seconds, out)
    np.testing.assert_allclose(out, StandardScaler().fit_transform(seconds), rtol=1e-5, atol=1e-6)


def test_scale_multiplies_and_defaults_to_1() -> None:
    train = dataset(np.arange(12, dtype=np.uint8).reshape(3, 4))
    out = np.empty((3, 4), np.float32)
    make_preprocessing(job_pb2.Data(scale=1 / 255), train).apply(train.features, out)
    np.testing.assert_array_equal(out, train.features.astype(np.float32) * np.float32(1 / 255))
    make_preprocessing(job_pb2.Data(), train).apply(train.features, out)
    np.testing.assert_array_equal(out, train.features)


NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


@given(scale=NUMBERS, columns=st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=5))
def test_json_gives_back_an_equal_preprocessing(scale: float, columns: list[tuple[float, float]]) -> None:
    mean, deviation = zip(*columns, strict=True)
    for preprocessing in (Preprocessing(scale=scale), Preprocessing(mean=mean, deviation=deviation)):
        assert Preprocessing.from_json(preprocessing.to_json()) == preprocessing


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"scale": "x"}', '{"mean": [1], "deviation": []}', '{"mean": 3}', "7"]
)
def test_damaged_json_is_a_fault_that_shows_it(text: str) -> None:
    with pytest.raises(CheckpointFault, match="stored preprocessing is damaged") as caught:
        Preprocessing.from_json(text)
    assert repr(text) in str(caught.value)


def test_features_of_another_width_than_the_model_was_standardized_on_are_a_fault() -> None:
    preprocessing = Preprocessing(mean=(0.0, 0.0), deviation=(1.0, 1.0))
    with pytest.raises(DataFault, match=r"shape \(3,\), 3 a sample, do not fit the 2 "):
        preprocessing.apply(np.zeros((4, 3)), np.zeros((4, 3), np.float32))


def test_a_preprocessing_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Preprocessing().scale = 2.0  # type: ignore[misc]
    assert json.loads(Preprocessing().to_json()) == {"scale": 1.0}
