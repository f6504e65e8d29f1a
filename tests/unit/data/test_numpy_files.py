"""npy and npz: round trips, and one clear fault for each kind of damage."""

import io
import re
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from worker.data.numpy_files import read_npy, read_npz
from worker.errors import DataFault

VALUES = np.arange(24, dtype=np.float32).reshape(4, 6)


def npy(values: np.ndarray, **options: bool) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, **options)
    return buffer.getvalue()


def header(shape: str, descr: str = "'<f4'") -> bytes:
    """An npy file of nothing but a header that claims anything."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def fault_of(read: Callable[[], object], path: Path) -> str:
    with pytest.raises(DataFault) as caught:
        read()
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


@pytest.mark.parametrize("stored", ["?", "u1", "i8", "f2", "f4", "f8", ">f4", ">i2"])
@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 3), (5, 2, 3, 1)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_type_shape_and_layout_comes_back(
    tmp_path: Path, stored: str, shape: tuple[int, ...], order: str
) -> None:
    values = np.random.default_rng(0).integers(0, 9, shape).astype(stored, order=order)
    np.save(tmp_path / "a.npy", values)
    np.testing.assert_array_equal(read_npy(str(tmp_path / "a.npy")).values, values)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", x=values, y=values[::-1])
        for array, expected in zip(read_npz(str(tmp_path / "a.npz"), "x", "y"), (values, values[::-1]), strict=True):
            np.testing.assert_array_equal(array.values, expected)
            assert array.values.dtype == values.dtype.newbyteorder("=")
            assert array.values.flags.c_contiguous


def test_npy_is_mapped_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(64, 1 << 20)).flush()
    tracemalloc.start()
    try:
        values = read_npy(str(path)).values
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert isinstance(values.base, np.memmap)
    assert type(values) is np.ndarray
    assert not values.flags.writeable


NPY_FAULTS = {
    "empty": (b"", r"is empty \(0 bytes\)"),
    "not npy": (b"x" * 50, r"is not an npy file \(begins with 78 78"),
    "cut": (npy(VALUES)[:-7], r"declares float32 \(4, 6\), 224 bytes in all, but the file has 217"),
    "header cut": (npy(VALUES)[:40], "npy header is damaged"),
    "trailing garbage": (npy(VALUES) + b"abc", "224 bytes in all, but the file has 227"),
    "huge": (header("(4294967295, 4294967295)"), f"{4294967295**2 * 4 + 128} bytes in all, but the file has 128"),
    "negative": (header("(-2, -3)"), r"declares the shape \(-2, -3\)"),
    "not a header": (header("(2,", "[]"), "npy header is damaged"),
    "version": (b"\x93NUMPY\x09\x00" + b" " * 99, r"version \(9, 0\) is not known"),
    "objects": (npy(np.array([{}]), allow_pickle=True), "holds Python objects, which are never loaded; store integers"),
    "text": (npy(np.array(["a"])), "holds <U1, not numbers; store integers or floats"),
    "complex": (npy(np.array([1j])), "holds complex128, not numbers"),
    "records": (npy(np.zeros(2, "i4,f4")), "not numbers"),
}


@pytest.mark.parametrize("kind", NPY_FAULTS)
def test_a_damaged_npy_is_one_fault_with_path_and_byte_counts(tmp_path: Path, kind: str) -> None:
    content, message = NPY_FAULTS[kind]
    path = tmp_path / "a.npy"
    path.write_bytes(content)
    assert re.search(message, fault_of(lambda: read_npy(str(path)), path))


def archive(content: bytes, name: str = "x.npy", method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as target:
        target.writestr(name, content)
    return buffer.getvalue()


WHOLE = archive(npy(VALUES), method=zipfile.ZIP_STORED)
NPZ_FAULTS = {
    "empty": (b"", r"is empty \(0 bytes\)"),
    "not an archive": (b"x" * 50, r"is not an npz archive \(begins with 78 78"),
    "an npy": (npy(VALUES), "it is an npy file: name it under `npy`"),
    "cut": (WHOLE[:-30], f"npz archive of {len(WHOLE) - 30} bytes is damaged"),
    "checksum": (WHOLE.replace(VALUES.tobytes(), VALUES[::-1].tobytes()), "damaged .*Bad CRC-32"),
    "missing array": (archive(npy(VALUES), "weights.npy"), "has no array 'x'; the arrays there are: weights"),
    "array cut": (
        archive(npy(VALUES)[:-7]),
        r"array 'x': the npy header declares .* 224 bytes in all, the archive holds 217",
    ),
    "array huge": (archive(header("(4294967295, 4294967295)")), f"{4294967295**2 * 4 + 128} bytes in all, the archive"),
    "objects": (archive(npy(np.array([{}]), allow_pickle=True)), "holds Python objects, which are never loaded"),
    "compression": (archive(npy(VALUES), method=zipfile.ZIP_BZIP2), "compressed in a way NumPy never writes"),
}


@pytest.mark.parametrize("kind", NPZ_FAULTS)
def test_a_damaged_npz_is_one_fault_with_path_and_byte_counts(tmp_path: Path, kind: str) -> None:
    content, message = NPZ_FAULTS[kind]
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    assert re.search(message, fault_of(lambda: read_npz(str(path), "x"), path))


def test_an_archive_whose_directory_lies_about_sizes_takes_no_memory(tmp_path: Path) -> None:
    content = archive(header("(1000000000,)"), method=zipfile.ZIP_DEFLATED)
    size = len(header("(1000000000,)"))
    lie = size.to_bytes(4, "little"), (4_000_000_128).to_bytes(4, "little")
    path = tmp_path / "a.npz"
    path.write_bytes(content.replace(*lie))
    tracemalloc.start()
    try:
        message = fault_of(lambda: read_npz(str(path), "x"), path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert "declares 4000000128 bytes packed into" in message


def test_a_password_is_said(tmp_path: Path) -> None:
    content = bytearray(WHOLE)
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + flags] |= 1
    path = tmp_path / "a.npz"
    path.write_bytes(bytes(content))
    assert "is encrypted, password required" in fault_of(lambda: read_npz(str(path), "x"), path)
