"""text: windows of a memory-mapped file against plain slices of its bytes."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protos import job_pb2
from protos.job_file import JobFileInvalid, parse_job
from worker.data.batches import BatchReader
from worker.data.preprocessing import Preprocessing
from worker.data.sources import Dataset, open_source
from worker.data.split import hold_out
from worker.data.stored_array import BLOCK_BYTES
from worker.engine.model import Model
from worker.errors import DataFault
from worker.preparation import check_targets


def read(path: Path, context: int, kind: str = "labels") -> Dataset:
    return open_source(job_pb2.Source(text=job_pb2.TextSource(path=str(path), context=context)), kind)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(min_size=2, max_size=200), st.data())
def test_each_target_is_the_byte_behind_its_feature_and_comes_once(
    tmp_path: Path, text: bytes, data: st.DataObject
) -> None:
    context = data.draw(st.integers(1, len(text) - 1))
    (tmp_path / "a.txt").write_bytes(text)
    dataset = read(tmp_path / "a.txt", context)
    assert len(dataset) == (len(text) - 1) // context
    features, targets = BatchReader(dataset, Preprocessing(), len(dataset)).take(np.arange(len(dataset)))
    assert (features.dtype, targets.dtype) == (np.float32, np.int64)
    assert features.shape == targets.shape == (len(dataset), context)
    used = len(dataset) * context
    assert features.reshape(-1).tolist() == list(text[:used])
    assert targets.reshape(-1).tolist() == list(text[1 : used + 1])


def test_batches_of_a_held_out_part_are_windows_of_the_file(tmp_path: Path) -> None:
    text = np.random.default_rng(0).integers(0, 256, 1001, np.uint8).tobytes()
    (tmp_path / "a.txt").write_bytes(text)
    train, validation = hold_out(read(tmp_path / "a.txt", 10), 0.2, 1)
    assert (len(train), len(validation)) == (80, 20)
    features, targets = BatchReader(validation, Preprocessing(), 20).take(np.arange(20))
    assert validation.rows is not None
    for row, window, following in zip(validation.rows, features, targets, strict=True):
        assert bytes(window.astype(np.uint8)) == text[row * 10 : row * 10 + 10]
        assert bytes(following.astype(np.uint8)) == text[row * 10 + 1 : row * 10 + 11]


def test_a_large_text_is_neither_copied_nor_read_when_it_is_opened(tmp_path: Path) -> None:
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(1 << 33)  # 8 GiB that take no place on the disk
    tracemalloc.start()
    try:
        dataset = read(tmp_path / "a.txt", 128)
        check_targets(model_of(256, 128), dataset)
        _, targets = BatchReader(dataset, Preprocessing(), 4).take(np.array([0, len(dataset) - 1]))
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    assert len(dataset) == ((1 << 33) - 1) // 128
    assert not targets.any()


def model_of(outputs: int, context: int) -> Model:
    """Of a vocabulary and as many outputs."""
    model = f"[{{embedding: {{vocabulary: {outputs}, units: 1}}}}, {{linear: {{units: {outputs}}}}}]"
    job = parse_job(
        f"{{data: {{train: {{text: {{path: /a}}}}}}, model: {model}, loss: softmax_cross_entropy, optimizer: sgd}}"
    )
    return Model(job.model, job.loss, (context,))


def test_a_text_of_few_different_bytes_needs_no_outputs_for_the_others(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"plain ASCII" * 50)
    check_targets(model_of(128, 10), read(tmp_path / "a.txt", 10))


@pytest.mark.parametrize("outputs", [2, 128, 200, 255])
def test_a_byte_without_an_output_is_named_with_its_place(tmp_path: Path, outputs: int) -> None:
    text = bytearray(BLOCK_BYTES + 1000)
    text[BLOCK_BYTES + 501] = outputs
    (tmp_path / "a.txt").write_bytes(text)
    sample, position = divmod(BLOCK_BYTES + 500, 100)
    message = f"a.txt: label {outputs} of sample {sample}, position {position} is not among 0 to {outputs - 1}, the"
    with pytest.raises(DataFault, match=message):
        check_targets(model_of(outputs, 100), read(tmp_path / "a.txt", 100))


def test_labels_of_positions_stored_as_bytes_are_held_to_what_they_are(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 4)), y=np.array([[0, 1, 2, 0]] * 3, np.uint8))
    dataset = open_source(job_pb2.Source(npz=job_pb2.NpzSource(path=str(tmp_path / "a.npz"))), "labels")
    check_targets(model_of(3, 4), dataset)
    with pytest.raises(DataFault, match="label 2 of sample 0, position 2 is not among 0 to 1"):
        check_targets(model_of(2, 4), dataset)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (1, r"holds 1 bytes, too few for a sample of 11; name a longer text$"),
        (10, r"holds 10 bytes, too few for a sample of 11; name a longer text or set context to 9 at most$"),
        (0, r"is empty \(0 bytes\)"),
    ],
)
def test_a_text_too_short_for_one_sample_is_a_fault(tmp_path: Path, size: int, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * size)
    with pytest.raises(DataFault, match=message):
        read(tmp_path / "a.txt", 10)


def test_a_loss_of_values_cannot_take_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"hello")
    with pytest.raises(DataFault, match="a text gives labels, but the loss takes values; use softmax_cross_entropy"):
        read(tmp_path / "a.txt", 2, "values")


JOB = (
    "{data: {train: {text: {path: /a.txt}}, %s}, model: [{dense: {units: 256}}],"
    " loss: softmax_cross_entropy, optimizer: sgd}"
)


def test_the_context_has_a_default() -> None:
    assert parse_job(JOB % "validation_fraction: 0.1").data.train.text.context == 128


@pytest.mark.parametrize("option", ["scale: 0.5", "standardize: true"])
def test_the_numbers_of_bytes_cannot_be_scaled(option: str) -> None:
    with pytest.raises(JobFileInvalid, match=r"is given beside `text`, whose features are the numbers of bytes"):
        parse_job(JOB % option)
