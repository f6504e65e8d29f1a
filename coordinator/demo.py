"""`paceline demo`: one real job through every part, on this machine, in a few seconds.

Rules: nothing is staged. The coordinator is a real process on free ports, the job goes over gRPC, the workers are
started by mpirun, the numbers printed are those the parts gave. What was started is stopped, whatever happens.
"""

from __future__ import annotations

import importlib.resources
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from coordinator.client import Client
from coordinator.faults import CommandFault
from coordinator.follow import follow_job
from coordinator.interruption import Interrupted, stop_signals
from coordinator.launchers.local import LauncherMissing, find_worker
from coordinator.presentation import number
from coordinator.pull import write_folder
from coordinator.run import new_folder
from protos import job_pb2
from protos.exit_codes import ExitCode
from protos.job_file import parse_job

READY = re.compile(r"^paceline coordinator ready: grpc (?P<grpc>\S+), http (?P<http>\S+),", re.MULTILINE)
READY_SECONDS = 30.0
STOP_SECONDS = 15.0
EVALUATE_SECONDS = 60.0
SHOWN_SERIES = ("paceline_train_loss", "paceline_validation_accuracy_ratio", "paceline_samples_total", "paceline_jobs")


def demo() -> int:
    """Run it and return the exit code."""
    with stop_signals():
        try:
            return _demo()
        except Interrupted as interrupted:
            print(f"\nstopped by {interrupted}; the coordinator and the job are ended", file=sys.stderr)
            return interrupted.exit_code


def _demo() -> int:
    job = parse_job(importlib.resources.files("coordinator").joinpath("demo_job.yaml").read_text())
    print(f"Paceline demo: real handwritten digits, {job.workers} workers\n")
    folder = new_folder("demo", datetime.now())
    with tempfile.TemporaryDirectory(prefix="paceline-demo-") as state:
        with _coordinator(Path(state), job.workers) as (address, http), Client(address) as client:
            _say("coordinator", f"answers at {address}")
            job_id = client.submit(job).id
            _say("job", f"{job_id}: {_in_words(job)}\n")
            follow_job(client, job_id, as_json=False)
            print()
            _say("metrics", f"http://{http}/metrics says:")
            for line in _series(http):
                print(f"  {line}")
            files, written = write_folder(client.pull(job_id), folder)
            finished = client.get(job_id)
        _say("output", f"{folder}: {files} files, {written / 1e6:.1f} MB")
    _say("evaluate", f"the pulled model, in a process of its own, says:\n  {_evaluate(folder)}")
    accuracy = number(finished.summary.validation_accuracy)
    print(f"\nDone: {accuracy} of the digits the model never saw are read right.")
    return ExitCode.DONE


@contextmanager
def _coordinator(state: Path, slots: int) -> Iterator[tuple[str, str]]:
    """A coordinator of our own on free ports: its gRPC and HTTP addresses."""
    log = state / "coordinator.log"
    command = [sys.executable, "-P", "-m", "coordinator", "serve", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]
    with open(log, "wb") as out:
        # In a session of its own, or Ctrl-C would stop it before we have cancelled and told.
        process = subprocess.Popen(
            [*command, "--state", str(state / "state"), "--slots", str(slots)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield _wait_until_ready(process, log)
    finally:
        process.send_signal(signal.SIGINT)  # SIGTERM would leave jobs running
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            print(f"warning: the coordinator did not stop within {STOP_SECONDS:g} s and was killed", file=sys.stderr)


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> tuple[str, str]:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        code = process.poll()
        text = log.read_text(errors="replace")
        if ready := READY.search(text):
            return ready["grpc"], ready["http"]
        if code is not None:
            raise CommandFault(f"the coordinator ended with exit code {code} and said:\n{text.strip() or '(nothing)'}")
        time.sleep(0.05)
    raise CommandFault(
        f"the coordinator was not ready within {READY_SECONDS:g} s; it said:\n{text.strip() or '(nothing)'}"
    )


def _series(http: str) -> list[str]:
    """A few lines of what Prometheus would read."""
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
        f"http://{http}/metrics", timeout=10
    ) as page:
        lines = page.read().decode().splitlines()
    return [
        line
        for line in lines
        if line.startswith(tuple(f"{name}{{" for name in SHOWN_SERIES)) and not line.endswith(" 0.0")
    ]


def _evaluate(folder: Path) -> str:
    """What a fresh process finds with nothing but the pulled folder."""
    try:
        command = [find_worker(), "evaluate", str(folder), str(folder / "job.yaml")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=EVALUATE_SECONDS, check=False)
    except LauncherMissing as missing:
        raise CommandFault(str(missing)) from missing
    except subprocess.TimeoutExpired:
        raise CommandFault(f"paceline-worker evaluate was not done within {EVALUATE_SECONDS:g} s") from None
    if done.returncode:
        raise CommandFault(f"paceline-worker evaluate failed:\n{done.stderr.strip()}")
    return done.stdout.strip()


def _in_words(job: job_pb2.JobSpec) -> str:
    layers = ", ".join(
        f"dense {layer.dense.units}" if layer.HasField("dense") else str(layer.WhichOneof("kind"))
        for layer in job.model
    )
    optimizer = job.optimizer.WhichOneof("kind")
    return f"{layers}; {optimizer}, {job.training.epochs} epochs, batch {job.training.batch_size}"


def _say(what: str, words: str) -> None:
    print(f"{what:<12} {words}", flush=True)
