"""`make fuzz`: every reader of what others wrote, with bytes that atheris makes up, for some seconds each.

A finding is an exception that is not one of ours, a reader that takes longer than STALL_SECONDS over one input, or one
that takes more memory than MEMORY_MB; the input stays in the folder named with it. Prints a line for each harness: its
name, inputs read, seconds, what was found; and exits with 1 where anything was.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HARNESSES = ("job_file", "idx", "npz", "csv_table", "push")
STALL_SECONDS = 20  # on a machine that does other things too
MEMORY_MB = 2048
LONGEST_INPUT = 8192  # bytes
STARTS_IN_SECONDS = 120  # imports and instruments what it tries, and ends
FOUND = re.compile(r"^.*(?:Uncaught Python exception|ERROR: libFuzzer).*$(?:\n.*)?", re.MULTILINE)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Readers with made-up bytes.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"these alone: {', '.join(HARNESSES)}")
    parser.add_argument("--seconds", type=int, default=10, metavar="S", help="for each (default 10)")
    asked = parser.parse_args()
    if unknown := set(asked.names) - set(HARNESSES):
        parser.error(f"there is no harness {', '.join(sorted(unknown))}; there are {', '.join(HARNESSES)}")
    if importlib.util.find_spec("atheris") is None:
        parser.error("atheris is not installed: say `make fuzz`")
    return max([_run(name, asked.seconds) for name in asked.names or HARNESSES])


def _run(name: str, seconds: int) -> int:
    """Fuzz in a process of its own, for atheris ends it; 1 where something was found."""
    folder = Path(tempfile.mkdtemp(prefix=f"paceline-fuzz-{name}-"))
    arguments = {
        "max_total_time": seconds,
        "timeout": STALL_SECONDS,
        "rss_limit_mb": MEMORY_MB,
        "max_len": LONGEST_INPUT,
        "artifact_prefix": f"{folder}/found-",
        "print_final_stats": 1,
    }
    flags = [f"-{flag}={value}" for flag, value in arguments.items()]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.harness", name, str(folder), *flags],
        capture_output=True, text=True, errors="replace", timeout=seconds + STARTS_IN_SECONDS, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    count = re.search(r"number_of_executed_units: (\d+)", said)
    inputs = f"{int(count[1]):>9,}" if count else "no number of"
    print(f"{name:10} {inputs} inputs {time.monotonic() - began:6.1f} s  ", end="")
    if done.returncode == 0:
        print("nothing found", flush=True)
        shutil.rmtree(folder)
        return 0
    found = FOUND.search(said)
    print(f"found, see {folder}: {' '.join(found[0].split()) if found else f'exit code {done.returncode}'}", flush=True)
    print(said[-4000:], file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
