"""Tokens outside the vocabulary are found before the first step, wherever they stand."""

import re

import numpy as np
import pytest

from protos import job_pb2
from protos.rules import resolve
from worker.data import tokens
from worker.errors import DataFault
from worker.preparation import prepare

SAMPLES, TIME = 50, 4


def job(folder, vocabulary=10, scale=1.0, **arrays):
    """A model of tokens 0 to 9 over `arrays`, by the name of their source."""
    spec = job_pb2.JobSpec()
    for name, values in arrays.items():
        np.savez(folder / f"{name}.npz", x=values, y=np.zeros(len(values), np.int64))
        getattr(spec.data, name).npz.path = str(folder / f"{name}.npz")
    spec.data.scale = scale
    spec.model.add().embedding.CopyFrom(job_pb2.EmbeddingLayer(vocabulary=vocabulary, units=3))
    spec.model.add().dense.units = 2
    spec.loss.softmax_cross_entropy.SetInParent()
    spec.optimizer.sgd.SetInParent()
    return resolve(spec)


def features(dtype=np.int64):
    return np.random.default_rng(3).integers(0, 10, (SAMPLES, TIME)).astype(dtype)


@pytest.mark.parametrize(("dtype", "value"), [(np.int64, 10), (np.int64, -1), (np.uint8, 200), (np.float32, 2.5)])
@pytest.mark.parametrize("where", ["train", "validation"])
@pytest.mark.parametrize("block_bytes", [1, 1 << 22])
def test_file_sample_and_value_are_named(tmp_path, monkeypatch, dtype, value, where, block_bytes):
    monkeypatch.setattr(tokens, "BLOCK_BYTES", block_bytes)
    arrays = {"train": features(dtype), "validation": features(dtype)}
    arrays[where][37, 2] = value
    with pytest.raises(DataFault) as fault:
        prepare(job(tmp_path, **arrays))
    said = f": sample 37 (counted from 0) has {value:g} where a token is expected, a whole number from 0 to 9;"
    assert said in str(fault.value)
    assert f"{where}.npz" in str(fault.value)


def test_a_held_out_sample_has_its_number_in_the_file(tmp_path):
    values = features()
    values[41, 0] = 11
    spec = job(tmp_path, train=values)
    for fraction in (0.1, 0.9):
        spec.data.validation_fraction = fraction
        with pytest.raises(DataFault, match=re.escape("sample 41 (counted from 0) has 11")):
            prepare(spec)


def test_scaled_tokens_are_no_tokens(tmp_path):
    with pytest.raises(DataFault, match="tokens are not scaled"):
        prepare(job(tmp_path, scale=0.1, train=features()))


def test_bytes_are_not_read_for_a_vocabulary_of_them_all(tmp_path, monkeypatch):
    prepare(job(tmp_path, train=features()))
    monkeypatch.setattr(tokens, "BatchReader", None)
    prepare(job(tmp_path, vocabulary=256, train=features(np.uint8)))
