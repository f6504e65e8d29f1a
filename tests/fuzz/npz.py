"""NPZ and NPY files: arrays of numbers, or a Fault; never a pickle."""

from __future__ import annotations

from tests.fuzz.scratch import scratch_file
from tests.unit.data.whole_files import WHOLE
from worker.data.numpy_files import read_npy, read_npz
from worker.errors import Fault

FILE = scratch_file("data.npz")
SEEDS = [WHOLE["a.npz"], WHOLE["b.npz"], WHOLE["a.npy"]]


def read(data: bytes) -> None:
    FILE.write_bytes(data)
    try:
        if data.startswith(b"PK"):
            read_npz(str(FILE), "x")
        else:
            read_npy(str(FILE))
    except Fault:
        return
