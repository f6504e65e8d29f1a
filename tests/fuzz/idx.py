"""IDX files, plain and compressed: an array that holds what the header says, or a Fault."""

from __future__ import annotations

from tests.fuzz.scratch import scratch_file
from tests.unit.data.whole_files import WHOLE
from worker.data.idx import read_idx
from worker.errors import Fault

FILE = scratch_file("data.idx")
SEEDS = [WHOLE["a.idx"], WHOLE["a.gz"]]


def read(data: bytes) -> None:
    FILE.write_bytes(data)
    try:
        read_idx(str(FILE))
    except Fault:
        return
