"""16-bit formats, the largest elements and PowerSGD's factors against PyTorch's own."""

import numpy as np
import pytest

from protos import job_pb2
from worker.compression import make_codec
from worker.compression.codec import BLOCK_ELEMENTS, decode, encode, encoded_bytes
from worker.compression.power_sgd import orthonormalize, product

torch = pytest.importorskip("torch", reason="PyTorch is not installed: make test-oracle installs and runs it")
pytestmark = pytest.mark.oracle


def there_and_back(wire_format: job_pb2.WireFormat, values: np.ndarray) -> np.ndarray:
    codec = make_codec(wire_format)
    encoded, out = np.empty(encoded_bytes(codec, len(values)), np.uint8), np.empty_like(values)
    encode(codec, values, encoded)
    decode(codec, encoded, out)
    return out


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_every_upper_half_with_every_kind_of_lower_half_rounds_as_in_pytorch(kind: str) -> None:
    """Lower halves at, just below and just above the midway points of both formats."""
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0x0FFF, 0x1000, 0x1001, 0x3000, 0xFFFF], np.uint32)
    bits = (np.arange(1 << 16, dtype=np.uint32) << 16)[:, None] | lower
    values = bits.reshape(-1).view(np.float32)
    dtype = getattr(torch, kind)
    values = values[np.abs(values) <= torch.finfo(dtype).max]  # what is beyond saturates here, and not there
    wire_format = job_pb2.WireFormat()
    getattr(wire_format, kind).SetInParent()
    theirs = torch.from_numpy(values.copy()).to(dtype).to(torch.float32).numpy()
    np.testing.assert_array_equal(there_and_back(wire_format, values).view(np.uint32), theirs.view(np.uint32))


def test_the_largest_elements_are_those_of_torch_topk() -> None:
    values = np.random.default_rng(3).standard_normal(BLOCK_ELEMENTS).astype(np.float32)
    kept = there_and_back(job_pb2.WireFormat(top_k=job_pb2.TopKFormat(fraction=0.01)), values)
    theirs = torch.topk(torch.from_numpy(np.abs(values)), int(np.count_nonzero(kept))).indices.numpy()
    assert np.count_nonzero(kept) == 656
    np.testing.assert_array_equal(np.flatnonzero(kept), np.sort(theirs))


def test_a_step_of_power_iteration_is_what_pytorchs_qr_gives() -> None:
    random = np.random.default_rng(4)
    gradient, right = random.standard_normal((90, 70)), random.standard_normal((70, 4))
    left = np.ascontiguousarray((gradient @ right).T, np.float32)
    orthonormalize(left)
    ours = np.empty((90, 70), np.float32)
    product(left, (left @ gradient).astype(np.float32), ours, np.empty(BLOCK_ELEMENTS, np.float32))
    basis, _ = torch.linalg.qr(torch.from_numpy(gradient @ right))
    np.testing.assert_allclose(ours, (basis @ (basis.T @ torch.from_numpy(gradient))).numpy(), atol=1e-5)
