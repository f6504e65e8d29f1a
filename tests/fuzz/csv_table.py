"""CSV files: columns of numbers, or a Fault."""

from __future__ import annotations

from tests.fuzz.scratch import scratch_file
from tests.unit.data.whole_files import WHOLE
from worker.data.table import read_csv, read_csv_features
from worker.errors import Fault

FILE = scratch_file("data.csv")
SEEDS = [WHOLE["a.csv"], b'"b",a\r\n"1",-inf\r\n', b"b,c,b\n1,2,3\n"]


def read(data: bytes) -> None:
    FILE.write_bytes(data)
    for reader in (lambda: read_csv(str(FILE), "b"), lambda: read_csv_features(str(FILE), "b")):
        try:
            reader()
        except Fault:
            continue
