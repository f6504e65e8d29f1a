"""`paceline demo`: every part once, for real, and nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.end_to_end.jobs import NEEDS_MPIRUN

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
pytestmark = NEEDS_MPIRUN
WAIT_SECONDS = 90.0


def start_demo(folder: Path) -> subprocess.Popen[str]:
    temporary = folder / "temporary"
    temporary.mkdir()
    return subprocess.Popen(
        [str(BIN / "paceline"), "demo"],
        cwd=folder,
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def left_running(folder: Path) -> list[str]:
    """Command lines of processes that work in the folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if str(folder) in (entry / "environ").read_text(errors="replace"):
                    found.append((entry / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
    return found


def test_the_demo_job_is_the_example():
    assert (ROOT / "coordinator" / "demo_job.yaml").read_text() == (ROOT / "examples" / "digits.yaml").read_text()


def test_the_demo_trains_shows_metrics_pulls_and_evaluates(tmp_path):
    demo = start_demo(tmp_path)
    out, errors = demo.communicate(timeout=WAIT_SECONDS)
    assert (demo.returncode, errors) == (0, "")
    accuracy = float(re.search(r"Done: (\d\.\d+) of the digits", out)[1])
    assert accuracy >= 0.97
    assert f"accuracy {accuracy:.4f}" in out.splitlines()[-3]  # what evaluate found in the pulled folder
    for words in ("paceline_train_loss{job=", "paceline_samples_total{job=", 'paceline_jobs{state="SUCCEEDED"} 1.0'):
        assert words in out
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "model.safetensors").stat().st_size > 1000
    assert left_running(tmp_path) == []
    assert list((tmp_path / "temporary").iterdir()) == []


def test_ctrl_c_ends_the_demo_with_all_it_started(tmp_path):
    demo = start_demo(tmp_path)
    deadline = time.monotonic() + WAIT_SECONDS
    while not any("paceline-worker train" in line for line in left_running(tmp_path)):
        assert time.monotonic() < deadline, f"a worker within {WAIT_SECONDS} s"
        time.sleep(0.02)
    demo.send_signal(signal.SIGINT)
    out, errors = demo.communicate(timeout=WAIT_SECONDS)
    assert demo.returncode == 130, out
    assert errors.strip() == "stopped by SIGINT; the coordinator and the job are ended"
    assert left_running(tmp_path) == []
