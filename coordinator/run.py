"""`paceline run`: trains here and now through mpirun, without a coordinator.

Rules: the workers do the work and write the output folder; this process starts them, reads metrics.jsonl as it grows,
and has them write a checkpoint and leave when it is itself told to end; told twice, it ends them. Nothing is made in
the output folder by this side but `logs`, moved there when all is over.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from google.protobuf import json_format

from coordinator.faults import CommandFault
from coordinator.interruption import Interrupted, stop_signals
from coordinator.launchers.local import (
    Cause,
    Launch,
    LauncherMissing,
    Running,
    available_cores,
    explain,
    find_mpirun,
    find_worker,
    render,
    start,
)
from coordinator.presentation import facts_text, json_line, printable, summary_facts
from coordinator.progress import Display, open_display
from protos import job_pb2
from protos.exit_codes import ExitCode
from protos.job_file import JobFileInvalid, read_job_file

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
CHECKPOINTS = "checkpoints"
# What the worker makes. A folder is a run worth keeping once it holds a result or a checkpoint: before, there is
# nothing to go on with, and the worker starts anew in it.
RUN_FILES = ("job.yaml", METRICS, SUMMARY, "model.safetensors", CHECKPOINTS)
RESULTS = (SUMMARY, "model.safetensors")
# The first rank's log holds what it says on the way. Of this, progress is shown from the reports, and how it ended from
# the exit code.
FIRST_LOG, SHOWN_OTHERWISE = "rank-0.log", (b"epoch ", b"error: ", b"resuming after ", b"stopped by ")
POLL_SECONDS = 0.1
GRACE_SECONDS = 10.0  # for the workers to end by themselves when told to
LEAVE_SECONDS = 5.0  # beyond limits.grace_seconds, for the way out


@dataclass(frozen=True)
class RunOptions:
    """What was typed."""

    job_file: Path
    ranks: int | None  # None takes `workers` of the job file
    output: Path | None  # None makes a folder under ./runs
    settings: tuple[str, ...] = ()
    resume: bool = False
    as_json: bool = False


def run(options: RunOptions) -> int:
    """Train and return the exit code; CommandFault says what went wrong."""
    settings = options.settings
    if options.ranks is not None:
        settings = (*settings, f"workers={options.ranks}")
    job = load_job(options.job_file, settings)
    if options.resume and options.output is None:
        raise CommandFault("--resume needs -o DIR, the folder of the run to go on with", ExitCode.USAGE)
    output = options.output if options.output is not None else new_folder(job.name, datetime.now())
    check_output(output, options.resume)
    mpirun, worker = _programs()
    cores = available_cores()
    if job.workers > cores:
        say(f"warning: {job.workers} workers share {cores} cores and take turns; -n {cores} gives each its own")
    if job.sync.parameter_server.guests:
        say(f"guests may come while it runs: paceline join {output}")
    log_dir = Path(tempfile.mkdtemp(prefix="paceline-run-"))
    launch = render(
        mpirun=mpirun,
        worker=worker,
        ranks=job.workers,
        cores=cores,
        arguments=worker_arguments(options, settings, output, log_dir),
        forwarded={},
    )

    with stop_signals(times=2):
        try:
            with open_display(options.as_json, job.training.epochs) as display:
                display.state(f"{printable(job.name)}: starting {_workers(job.workers)}")
                tail, patience = MetricsTail(output / METRICS), job.limits.grace_seconds + LEAVE_SECONDS
                exit_code = _train(launch, log_dir, tail, display, patience)
        except Interrupted as interrupted:
            say(_interrupted_words(str(interrupted), options, output, keep_logs(log_dir, output)))
            return interrupted.exit_code
    if exit_code == ExitCode.INTERRUPTED:
        say(_interrupted_words("a signal to a worker", options, output, keep_logs(log_dir, output)))
        return exit_code
    cause = explain(exit_code, log_dir) if exit_code else None
    logs: Path | None = keep_logs(log_dir, output)
    if cause is not None:
        if logs == log_dir and cause.told_whole:
            shutil.rmtree(log_dir)
            logs = None
        raise CommandFault(
            failure_text(cause, logs), ExitCode.USAGE if exit_code == ExitCode.USAGE else ExitCode.FAILED
        )
    _print_result(options, job, output)
    return ExitCode.DONE


def load_job(path: Path, settings: Sequence[str]) -> job_pb2.JobSpec:
    """The checked job; every violation is a line of the CommandFault."""
    try:
        return read_job_file(path, settings)
    except JobFileInvalid as invalid:
        raise CommandFault(str(invalid), ExitCode.USAGE) from invalid


def new_folder(name: str, now: datetime) -> Path:
    """`runs/NAME-TIME`, with the name reduced to what every file system takes."""
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip("-.") or "job"
    return Path("runs") / f"{safe[:60]}-{now:%Y%m%d-%H%M%S}"


def check_output(folder: Path, resume: bool) -> None:
    """Refuse to write over a run, and to resume what is none; the worker does too, but only once MPI is up."""
    if folder.exists() and not folder.is_dir():
        raise CommandFault(f"{folder} is a file; name a folder with -o", ExitCode.USAGE)
    checkpoint = has_checkpoint(folder)
    held = [name for name in RESULTS if (folder / name).exists()] + ([CHECKPOINTS] if checkpoint else [])
    if held and not resume:
        remedy = "go on with it by --resume, or name" if checkpoint else "name"
        raise CommandFault(
            f"{folder} already holds a run ({', '.join(held)}); {remedy} another folder with -o", ExitCode.USAGE
        )
    if not resume or checkpoint:
        return
    if held:
        lost = f"{folder} holds a run ({', '.join(held)}) without a checkpoint to go on from"
        raise CommandFault(f"{lost}; name another folder with -o", ExitCode.USAGE)
    if any((folder / name).exists() for name in RUN_FILES):
        raise CommandFault(f"{folder} holds no checkpoint yet; leave --resume out to start anew", ExitCode.USAGE)
    raise CommandFault(f"{folder} holds no run to resume; leave --resume out to start one", ExitCode.USAGE)


def has_checkpoint(folder: Path) -> bool:
    """Whether a run got far enough to leave one."""
    return any((folder / CHECKPOINTS).glob("step-*.safetensors"))


def worker_arguments(options: RunOptions, settings: Sequence[str], output: Path, log_dir: Path) -> list[str]:
    """What `paceline-worker` is told."""
    arguments = ["train", str(options.job_file), "-o", str(output), "--log-dir", str(log_dir)]
    for setting in settings:
        arguments += ["--set", setting]
    return [*arguments, "--resume"] if options.resume else arguments


def _programs() -> tuple[str, str]:
    try:
        return find_mpirun(), find_worker()
    except LauncherMissing as missing:
        raise CommandFault(str(missing)) from missing


def _train(launch: Launch, log_dir: Path, tail: MetricsTail, display: Display, patience_seconds: float) -> int:
    """Run the launch to its end, showing each new report; told to end, give it `patience_seconds` for a checkpoint."""
    running: Running | None = None
    notes = NotesTail(log_dir / FIRST_LOG)
    try:
        running = start(launch, log_dir)
        return next(code for code in _follow(running, tail, notes, display) if code is not None)
    except Interrupted:
        if running is not None:
            running.ask_to_stop()
            display.state("stopping behind the step under way; told again, it ends at once")
            deadline = time.monotonic() + patience_seconds
            for code in _follow(running, tail, notes, display):
                if code is not None or time.monotonic() > deadline:
                    break
            if running.poll() == ExitCode.DONE:  # it was at its results already
                return ExitCode.DONE
        raise
    finally:
        if running is not None and running.poll() is None:
            running.terminate(GRACE_SECONDS)


def _follow(running: Running, tail: MetricsTail, notes: NotesTail, display: Display) -> Iterator[int | None]:
    """Show each new report, and say again and again how the launch has ended; None while it runs."""
    while True:
        exit_code = running.wait(POLL_SECONDS)
        if exit_code is None:  # what it says under way comes before what it reports, and at its end behind
            _show_notes(notes, display)
        for report in tail.read():  # after the look at the process: what it wrote last is read too
            display.report(report)
        if exit_code is not None:
            _show_notes(notes, display)
        yield exit_code


def _show_notes(notes: NotesTail, display: Display) -> None:
    for line in notes.read():
        display.note(line)


class MetricsTail:
    """Reads the reports added to metrics.jsonl.

    A resumed run writes the file anew without the steps it will do again, one that starts anew without any: lines it
    had before are no news.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = set(path.read_bytes().splitlines()) if path.exists() else set()
        self._inode = 0
        self._offset = 0

    def read(self) -> Iterator[job_pb2.Report]:
        try:
            file = open(self._path, "rb")  # noqa: SIM115  # closed by the with below; only its absence is expected
        except FileNotFoundError:
            return
        with file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:  # replaced, or emptied
                self._inode, self._offset = status.st_ino, 0
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # still being written
                self._offset += len(line)
                if line.rstrip(b"\n") not in self._known:
                    yield json_format.Parse(line, job_pb2.Report(), ignore_unknown_fields=True)


class NotesTail:
    """Reads what the first rank has added to its log for people: the weights it begins with, the way it exchanges."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> Iterator[str]:
        try:
            file = open(self._path, "rb")  # noqa: SIM115  # closed by the with below; only its absence is expected
        except FileNotFoundError:
            return
        with file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # still being written
                self._offset += len(line)
                if line.strip() and not line.startswith(SHOWN_OTHERWISE):
                    yield printable(line.decode(errors="replace").rstrip("\n"))


def keep_logs(log_dir: Path, output: Path) -> Path:
    """Move the logs into the output folder if the run got as far as making one, and say where they are now."""
    if not any((output / name).exists() for name in RUN_FILES):
        return log_dir
    number = 1
    while (kept := output / ("logs" if number == 1 else f"logs-{number}")).exists():
        number += 1  # a resumed run leaves the logs of the run before alone
    shutil.move(log_dir, kept)
    return kept


def failure_text(cause: Cause, logs: Path | None) -> str:
    """One short message, the log's last lines, and where the rest is; None when there is no rest."""
    where = [] if logs is None else [f"  logs: {logs}"]
    return "\n".join([cause.message, *(f"  | {printable(line)}" for line in cause.last_lines), *where])


def _interrupted_words(by: str, options: RunOptions, output: Path, logs: Path) -> str:
    where = f"logs: {logs}"
    if has_checkpoint(output):
        return f"stopped by {by}; go on with: {resume_command(options, output)} ({where})"
    return f"stopped by {by}, before there was a checkpoint ({where})"


def resume_command(options: RunOptions, output: Path) -> str:
    """What a shell takes to go on with the same job: what was typed over the job file is typed again."""
    words = ["paceline", "run", str(options.job_file)]
    if options.ranks is not None:
        words += ["-n", str(options.ranks)]
    words += ["-o", str(output)]
    for setting in options.settings:
        words += ["--set", setting]
    return shlex.join([*words, "--resume"])


def _print_result(options: RunOptions, job: job_pb2.JobSpec, output: Path) -> None:
    try:
        text = (output / SUMMARY).read_text()
        summary = json_format.Parse(text, job_pb2.Summary(), ignore_unknown_fields=True)
    except (OSError, json_format.ParseError) as error:
        raise CommandFault(f"the workers ended well but left no readable {output / SUMMARY}: {error}") from error
    if options.as_json:
        print(json_line({"summary": json.loads(text), "output": str(output)}))
    else:
        print(f"{printable(job.name)}: done\n{facts_text([*summary_facts(summary), ('output folder', str(output))])}")


def _workers(count: int) -> str:
    return f"{count} worker" if count == 1 else f"{count} workers"


def say(line: str) -> None:
    """A line beside the output proper."""
    print(line, file=sys.stderr, flush=True)
