"""The idx reader: round trips against NumPy, Fashion-MNIST, and one clear fault for each kind of damage."""

import gzip
import re
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker.data.idx import TYPES, read_idx
from worker.errors import DataFault

FASHION = Path("/usr/share/datasets/fashion-mnist")
IMAGES = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


def encode(values: np.ndarray) -> bytes:
    """What the format's page says, written independently of the reader."""
    code = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}[values.dtype.str[1:]]
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, code, values.ndim, *values.shape)
    return header + values.astype(values.dtype.newbyteorder(">")).tobytes()


def fault_of(path: Path) -> str:
    with pytest.raises(DataFault) as caught:
        read_idx(str(path))
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(
    stored=st.sampled_from(sorted(TYPES.values())),
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    pack=st.sampled_from([bytes, gzip.compress]),
    seed=st.integers(0, 1000),
)
def test_every_type_and_shape_comes_back_plain_and_compressed(
    tmp_path: Path, stored: str, shape: list[int], pack: Callable[[bytes], bytes], seed: int
) -> None:
    values = np.random.default_rng(seed).integers(0, 120, shape).astype(np.dtype(stored).newbyteorder("="))
    path = tmp_path / "data"
    path.write_bytes(pack(encode(values)))
    array = read_idx(str(path)).values
    assert array.dtype == values.dtype
    assert array.dtype.isnative
    np.testing.assert_array_equal(array, values)


@pytest.mark.skipif(not FASHION.is_dir(), reason="needs Fashion-MNIST: apt-get install dataset-fashion-mnist")
def test_fashion_mnist_is_read_as_its_authors_describe_it() -> None:
    images = read_idx(str(FASHION / "t10k-images-idx3-ubyte.gz")).values
    labels = read_idx(str(FASHION / "t10k-labels-idx1-ubyte.gz")).values
    assert (images.dtype, images.shape) == (np.uint8, (10_000, 28, 28))
    assert np.bincount(labels).tolist() == [1000] * 10
    unpacked = gzip.decompress((FASHION / "t10k-images-idx3-ubyte.gz").read_bytes())
    np.testing.assert_array_equal(images.reshape(-1), np.frombuffer(unpacked, np.uint8, offset=16))


def test_a_gzip_file_of_several_members_is_read(tmp_path: Path) -> None:
    data = encode(IMAGES)
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(data[:20]) + gzip.compress(data[20:]))
    np.testing.assert_array_equal(read_idx(str(path)).values, IMAGES)


PLAIN = encode(IMAGES)  # 16 bytes of header, 24 of numbers
PACKED = gzip.compress(PLAIN)
FAULTS = {
    "empty": ("x", b"", r"is empty \(0 bytes\); fetch"),
    "first bytes cut": ("x", PLAIN[:3], "ends after 3 bytes, inside the 4 bytes"),
    "header cut": ("x", PLAIN[:9], "ends after 9 bytes, inside the 16 bytes of its idx header"),
    "cut": ("x", PLAIN[:-5], "declares 2 x 3 x 4 of uint8, 40 bytes in all, but the file has 35; fetch"),
    "trailing garbage": ("x", PLAIN + b"abc", "40 bytes in all, but the file has 43; fetch"),
    "another format": ("x", b"a,b\n1,2\n", "is not an idx file: begins with 61 2c 62 0a where 00 00 is due"),
    "unknown type": ("x", b"\0\0\x07\x01\0\0\0\1a", "idx type byte is 0x07, known are 0x08, 0x09, 0x0b"),
    "no dimensions": ("x", b"\0\0\x08\x00", "declares 0 dimensions, 1 to 4 can be read"),
    "many dimensions": ("x", b"\0\0\x08\xff" + b"\0" * 1020, "declares 255 dimensions, 1 to 4 can be read"),
    "not gzip": ("x.gz", PLAIN, r"is named .gz but is not gzip \(begins with 00 00\)"),
    "gzip cut": ("x.gz", PACKED[:-12], f"breaks off after {len(PACKED) - 12} bytes; fetch"),
    "gzip checksum": ("x.gz", PACKED[:-8] + b"\0" * 8, r"gzip stream is damaged \(CRC check failed"),
    "gzip garbage inside": ("x.gz", PACKED[:10] + b"\xff" * 30, r"gzip stream is damaged \(Error -3"),
    "gzip trailing garbage": ("x.gz", PACKED + b"garbage", r"gzip stream is damaged \(Not a gzipped file"),
    "gzip of fewer": ("x.gz", gzip.compress(PLAIN[:-5]), "40 bytes in all, but it ends after 35; fetch"),
    "gzip of more": ("x.gz", gzip.compress(PLAIN + b"a"), "40 bytes in all, but it unpacks to more; fetch"),
    "gzip of nothing": ("x.gz", gzip.compress(b""), "ends after 0 bytes, inside the 4 bytes"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_damage_is_one_fault_with_path_and_byte_counts(tmp_path: Path, kind: str) -> None:
    name, content, message = FAULTS[kind]
    path = tmp_path / name
    path.write_bytes(content)
    assert re.search(message, fault_of(path))


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_declared_size_the_file_cannot_hold_is_refused_before_any_memory_is_taken(
    tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "huge"
    path.write_bytes(pack(struct.pack(">BBBB3I", 0, 0, 8, 3, 0xFFFFFFFF, 0xFFFFFFFF, 3) + b"\0" * 100))
    tracemalloc.start()
    try:
        message = fault_of(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert f"declares 4294967295 x 4294967295 x 3 of uint8, {0xFFFFFFFF**2 * 3 + 16} bytes in all" in message


def test_a_missing_file_a_folder_and_a_missing_folder_are_told_apart(tmp_path: Path) -> None:
    assert "no such file; check the path" in fault_of(tmp_path / "x")
    assert f"no such file: the folder {tmp_path / 'y'} does not exist either" in fault_of(tmp_path / "y" / "x")
    assert "is a folder; give the path of a data file" in fault_of(tmp_path)
    assert "is not a regular file" in fault_of(Path("/dev/null"))
