"""How the benchmark reads memory, and its table of invented figures."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.memory import COPIES, PEER, SHARED, Watch, descendants, memory_table, proportional_bytes

MEGABYTE = 1_000_000


def test_a_row_says_what_all_take_and_each_rank_more_than_one() -> None:
    measured = {
        (1, SHARED): [100e6, 110e6],
        (1, PEER): [400e6, 400e6],
        (4, SHARED): [160e6, 170e6],
        (4, COPIES): [400e6, 410e6],
        (4, PEER): [1600e6, 1600e6],
    }
    rows = {(row[1], row[2]): row[3:] for row in memory_table(measured).rows}
    assert rows["1", SHARED] == ("105 [100 .. 110]", "")
    assert rows["4", SHARED] == ("165 [160 .. 170]", "20")
    assert rows["4", COPIES] == ("405 [400 .. 410]", "100")
    assert rows["4", PEER] == ("1,600", "400")


def test_memory_that_two_processes_share_counts_half_for_each(tmp_path: Path) -> None:
    shared_file = tmp_path / "shared"
    shared_file.write_bytes(b"x" * 100 * MEGABYTE)
    holds = "import mmap, sys; file = open(sys.argv[1], 'r+b'); held = mmap.mmap(file.fileno(), 0); held[::4096]; "
    command = [sys.executable, "-c", f"{holds} print('held', flush=True); sys.stdin.read()", str(shared_file)]
    with shared_file.open("r+b") as file, mmap.mmap(file.fileno(), 0) as held:
        assert set(held[::4096]) == {ord("x")}
        alone = proportional_bytes(os.getpid())
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            assert alone - proportional_bytes(os.getpid()) > 40 * MEGABYTE
            process.communicate()
    assert proportional_bytes(process.pid) == 0


def test_the_watch_sees_what_a_child_and_its_child_take_together() -> None:
    holds = "held = bytearray(60_000_000); held[::4096] = b'x' * len(held[::4096]); import subprocess, sys; "
    inner = f"{holds} print('held', flush=True); sys.stdin.read()"
    outer = f"{holds} subprocess.run([sys.executable, '-c', {inner!r}])"
    with Watch() as watch:
        process = subprocess.Popen(
            [sys.executable, "-c", outer], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert len(descendants(process.pid)) == 1
        watch.read()
        process.communicate()
    assert watch.largest_bytes > 120 * MEGABYTE
