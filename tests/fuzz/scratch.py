"""A file in memory for readers that take a path."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

MEMORY = "/dev/shm"


def scratch_file(name: str) -> Path:
    folder = tempfile.mkdtemp(prefix="paceline-fuzz-", dir=MEMORY if os.access(MEMORY, os.W_OK) else None)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder) / name
