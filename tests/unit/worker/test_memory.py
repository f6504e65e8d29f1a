"""The memory a process has held: its own and not what it has mapped of its data."""

import mmap
from pathlib import Path

import numpy as np

from worker.memory import MemoryPeak

MEGABYTES = 64 << 20


def test_pages_of_a_mapped_data_file_do_not_count(tmp_path: Path) -> None:
    with (tmp_path / "data").open("wb") as file:
        file.truncate(MEGABYTES)
    memory = MemoryPeak()
    before, highest_before = memory.bytes(maps_data=True), memory.bytes(maps_data=False)
    mapped = np.memmap(tmp_path / "data", np.uint8, mode="r")
    assert not mapped[:: mmap.PAGESIZE].any()  # now every page is there
    assert memory.bytes(maps_data=True) - before < MEGABYTES // 4
    assert memory.bytes(maps_data=False) >= highest_before


def test_what_was_held_and_given_back_counts() -> None:
    memory = MemoryPeak()
    before = memory.bytes(maps_data=True)
    held = np.ones(MEGABYTES, np.uint8)
    memory.look()
    del held
    for maps_data in (True, False):
        assert memory.bytes(maps_data) >= MEGABYTES
    assert memory.bytes(maps_data=True) - before >= MEGABYTES * 3 // 4
