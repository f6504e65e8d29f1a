"""Slurm as a launcher: a batch job for each attempt, given to sbatch, looked at with squeue and ended with scancel.

Rules: `render` is pure and says everything that the batch job will run. Slurm runs the keeper (keeper.py), and that
mpirun, which finds the job's nodes by itself. Slurm ends a job with SIGTERM to every process and SIGKILL after its
KillWait; a time limit is announced by SIGUSR1 to the keeper before. The state folder is at the same path on every node.
Secrets go by environment, which Slurm keeps to itself, never into the script.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from coordinator.folders import JobFolder
from coordinator.jobs import Job
from coordinator.launchers import foreign, keeper, local
from coordinator.launchers.causes import LAUNCHER_LOG, begin_attempt
from coordinator.launchers.foreign import NoAnswer, Seen, SubmitRefused
from coordinator.launchers.options import OptionInvalid
from coordinator.launchers.slurm_states import seen_of
from coordinator.runs import Command, Launcher

PROGRAMS = ("sbatch", "squeue", "scancel", "sinfo")
INSTALL = "install Slurm's commands (Debian: apt-get install slurm-client)"
COMMAND_SECONDS = 10.0
LEAVE_SECONDS = 10  # beyond limits.grace_seconds, for a job that is told of its time limit

# What --launcher-option takes -> what it is for; each is the option of sbatch that has its name.
OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "partition": "where jobs run",
        "account": "what they are charged to",
        "qos": "quality of service",
        "time": "limit of each launch, such as 2:00:00",
        "constraint": "features of the nodes",
        "reservation": "whose nodes they use",
        "nodes": "how many nodes a job's ranks share, such as 1 or 1-4",
        "nodelist": "nodes they must have",
        "exclude": "nodes they must not have",
        "mem-per-cpu": "memory of a rank, such as 2G",
        "cpus-per-task": "cores of a rank",
    }
)
VALUE = re.compile(r"[A-Za-z0-9_.,:\[\]()&|*+=/-]+")  # what no shell and no directive of sbatch's takes for more

# What sbatch and its kin say when nobody answered, so that it may go well another time.
NO_ANSWER = (
    "Unable to contact slurm controller",
    "Socket timed out",
    "Zero Bytes were transmitted",
    "Connection refused",
    "Connection timed out",
    "Slurm controller not responding",
    "Slurm backup controller in standby",
    "Slurm temporarily unable to accept job",
    "Resource temporarily unavailable",
    "Could not establish a configuration source",
)
LOOK = ("squeue", "--me", "--noheader", "--states=all", "--format=%A|%T|%N|%r")
FIND = ("squeue", "--me", "--noheader", "--states=all", "--format=%A")
RECALL = ("sacct", "--noheader", "--parsable2", "--allocations", "--format=JobIDRaw,State,NodeList")

log = logging.getLogger("paceline.controller")


def read_options(options: Mapping[str, str]) -> Mapping[str, str]:
    """The options as given, raising OptionInvalid."""
    for name, value in options.items():
        if not VALUE.fullmatch(value):
            raise OptionInvalid(f"{name}={value}: nothing that sbatch's --{name} takes")
    return options


def check(options: Mapping[str, str]) -> int:
    """That Slurm is there and takes these options; how many cores its nodes have. OptionInvalid, LauncherMissing."""
    if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
        raise local.LauncherMissing(f"--launcher slurm: {', '.join(missing)} not on PATH: {INSTALL}")
    words = [f"--{name}={value}" for name, value in options.items()]
    partition = [word for word in words if word.startswith("--partition=")]
    try:
        cores = sum(int(line.rsplit("/", 1)[-1]) for line in _run("sinfo", "-h", "-o%C", *partition).splitlines())
    except (NoAnswer, SubmitRefused) as fault:
        remedy = "is slurmctld up, and slurm.conf this cluster's?"
        raise local.LauncherMissing(f"--launcher slurm: {fault}: {remedy}") from None
    try:
        _run("sbatch", "--test-only", "--ntasks=1", *words, "--wrap=true")
    except NoAnswer as fault:
        log.warning("slurmctld does not answer: %s", fault)  # it did a moment ago, and jobs wait for it
    except SubmitRefused as fault:
        if re.search("invalid|unknown|illegal|unrecognized", str(fault), re.IGNORECASE):
            raise OptionInvalid(f"sbatch refuses {' '.join(words) or 'a job'}: {fault}") from None
        log.warning("sbatch would refuse a job now: %s", fault)  # a partition may be closed for a while
    return cores


@dataclass(frozen=True)
class Batch:
    """What sbatch is given: the script, and the variables added to the environment of this process."""

    script: str
    environment: Mapping[str, str]


def render(
    *, name: str, python: str, launch: local.Launch, ranks: int, record: Path, log: Path, grace_seconds: float,
    options: Mapping[str, str],
) -> Batch:  # fmt: skip
    """The batch job that runs `launch` on nodes with room for so many ranks.

    Args:
        name: the job's, by which it is found again.
        record: the keeper's file.
        grace_seconds: what the ranks have, once told, to write a checkpoint before a time limit.
    """
    directives = {
        "job-name": name,
        "ntasks": str(ranks),
        "output": str(log).replace("%", "%%"),
        "open-mode": "append",
        "export": "ALL",
        "signal": f"B:USR1@{int(grace_seconds) + LEAVE_SECONDS}",
        **options,
    }
    command = (python, "-I", "-S", keeper.__file__, "--hosted", str(record), *launch.argv)
    lines = [
        "#!/bin/sh",
        *(f"#SBATCH --{word}={_quoted(value)}" for word, value in directives.items()),
        "#SBATCH --no-requeue",  # Paceline launches it again, from its newest checkpoint
        f"exec {' '.join(_quoted(word) for word in command)}",
    ]
    return Batch("\n".join(lines) + "\n", launch.environment)


class Slurm:
    """The cluster that the commands on PATH speak to (foreign.System)."""

    title = "Slurm"

    def submit(self, script: Path, environment: Mapping[str, str]) -> str:
        """Hand in a batch script and return the job's number. NoAnswer, SubmitRefused."""
        said = _run("sbatch", "--parsable", str(script), environment=environment)
        return said.split(";", 1)[0]

    def find(self, name: str) -> str | None:
        return next(iter(_run(*FIND, f"--name={name}").split()), None)

    def look(self, handles: Collection[str]) -> Mapping[str, Seen]:
        rows = dict(_row(line) for line in _run(*LOOK).splitlines() if line.count("|") >= 3)
        if gone := [handle for handle in handles if handle not in rows and handle != foreign.UNKNOWN_HANDLE]:
            rows |= _recalled(gone)
        return {handle: rows[handle] for handle in handles if handle in rows}

    def ask_to_stop(self, handle: str) -> None:
        """By SIGUSR1 to the keeper, which hands it on."""
        _end("scancel", "--batch", "--signal=USR1", handle)

    def end(self, handle: str, kill: bool) -> None:
        _end("scancel", *(("--signal=KILL", "--full") if kill else ()), handle)


def make_launcher(
    options: Mapping[str, str],
    mpirun: str,
    worker: str,
    command: Command,
) -> Launcher:
    """Starts `paceline-worker` through Slurm.

    Args:
        command: the worker's arguments and the variables that every rank must see, for a job, its token and its folder.
    """
    system = Slurm()
    watch = foreign.Watch(system)

    def start(job: Job, secret: str, folder: JobFolder) -> foreign.Running:
        arguments, forwarded = command(job, secret, folder)
        launch = local.render(
            mpirun=mpirun, worker=worker, ranks=job.slots, cores=job.slots, arguments=arguments, forwarded=forwarded
        )
        record = local.record_of(folder.logs, job.attempt)
        batch = render(
            name=name_of(job),
            python=sys.executable,
            launch=launch,
            ranks=job.slots,
            record=record.absolute(),
            log=(folder.logs / LAUNCHER_LOG).absolute(),
            grace_seconds=job.spec.limits.grace_seconds,
            options=options,
        )
        folder.logs.mkdir(parents=True, exist_ok=True)
        if job.attempt > 1:
            begin_attempt(folder.logs, job.attempt)
        script = record.with_name(record.name + ".sbatch")
        script.write_text(batch.script)
        return foreign.start(
            system, watch, name_of(job), folder.logs, job.attempt, lambda: system.submit(script, batch.environment)
        )

    def adopt(job: Job, folder: JobFolder) -> foreign.Running | local.Running | None:
        return foreign.adopt(system, watch, name_of(job), folder.logs, job.attempt)

    return Launcher(start, adopt, foreign.explain_end)


def name_of(job: Job) -> str:
    return f"paceline-{job.id}-{job.attempt}"


def _row(line: str) -> tuple[str, Seen]:
    handle, state, nodes, reason = line.split("|", 3)
    return handle, seen_of(handle, state, nodes, reason)


def _recalled(handles: Collection[str]) -> dict[str, Seen]:
    """What accounting knows of jobs that slurmctld has forgotten; nothing where there is none."""
    try:
        said = _run(*RECALL, f"--jobs={','.join(handles)}")
    except (NoAnswer, SubmitRefused, FileNotFoundError):
        return {}
    rows = (line.split("|") for line in said.splitlines() if line.count("|") == 2)
    return {handle: seen_of(handle, state.split()[0], nodes, "") for handle, state, nodes in rows if state}


def _end(*command: str) -> None:
    try:
        _run(*command)
    except SubmitRefused as fault:
        if "Invalid job id" not in str(fault) and "already completing or completed" not in str(fault):
            raise NoAnswer(str(fault)) from None


def _run(*command: str, environment: Mapping[str, str] | None = None) -> str:
    """What a command of Slurm's prints. NoAnswer, SubmitRefused: what it said when it did not do it."""
    variables = {**local.without_secrets(os.environ), **(environment or {})}
    try:
        done = subprocess.run(
            command, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=COMMAND_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"{command[0]} had no answer within {COMMAND_SECONDS:g} s") from None
    if done.returncode == 0:
        return done.stdout.strip()
    lines = [line.partition("error: ")[2] or line for line in done.stderr.splitlines() if line.strip()]
    words = next((line for line in reversed(lines)), f"{command[0]} ended with exit code {done.returncode}").strip()
    if any(said in done.stderr for said in NO_ANSWER):
        raise NoAnswer(words)
    raise SubmitRefused(words)


def _quoted(word: str) -> str:
    """As a shell takes it, and sbatch in its directives: in double quotes where it is not plain."""
    if re.fullmatch(r"[A-Za-z0-9_./:=@%,+-]+", word):
        return word
    return '"' + re.sub(r'([\\"$`])', r"\\\1", word) + '"'
