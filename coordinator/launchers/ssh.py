"""Several machines as a launcher: a host file, and mpirun, which reaches the other hosts by ssh.

Rules: `render` is pure and says everything that will be run; the launch is otherwise a local one (local.py), with
mpirun here and its ranks there. Which hosts are free is counted from the host files of the launches that run, so that
the next coordinator counts the same. Hosts are asked before ranks are started there (reach.py). The state folder, the
environment and the data are at the same path on every host.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from coordinator.folders import JobFolder
from coordinator.jobs import Job
from coordinator.launchers import local, reach
from coordinator.launchers.options import OptionInvalid
from coordinator.runs import Command, Launcher

OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "hosts": "a host file of Open MPI's: a name and slots=N a line",
        "ssh-config": "settings of ssh, in place of the user's",
    }
)
REACH_SECONDS = 10.0
LINE = re.compile(r"(?P<host>[A-Za-z0-9][A-Za-z0-9_.:-]*)(\s+slots=(?P<slots>\d+))?")
HOSTS = ".hosts"  # behind the record's name: where its ranks are
PLAN = ".plan"


def read_options(options: Mapping[str, str]) -> Mapping[str, str]:
    """The options with absolute paths, raising OptionInvalid."""
    if "hosts" not in options:
        raise OptionInvalid("hosts=FILE is missing: --launcher ssh starts ranks on the hosts that it names")
    paths = {name: Path(value).absolute() for name, value in options.items()}
    for name, path in paths.items():
        if not path.is_file():
            raise OptionInvalid(f"{name}={path}: there is no such file")
        if re.search(r"\s", str(path)):
            raise OptionInvalid(f"{name}={path}: mpirun takes no path with a blank in it")
    read_host_file(paths["hosts"])
    return {name: str(path) for name, path in paths.items()}


def read_host_file(path: Path) -> dict[str, int]:
    """Slots by host, in the order of the file. OptionInvalid names the line."""
    hosts: dict[str, int] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as fault:
        raise OptionInvalid(f"hosts={path}: cannot be read: {fault}") from fault
    for number, line in enumerate(lines, start=1):
        if not (words := line.partition("#")[0].strip()):
            continue
        match = LINE.fullmatch(words)
        if match is None:
            raise OptionInvalid(f"hosts={path}: line {number}: {words!r} is not `NAME slots=N`")
        host, slots = match["host"], int(match["slots"] or 1)
        if slots < 1 or host in hosts:
            why = f"{host} is there twice" if host in hosts else "slots=0 leaves no room for a rank"
            raise OptionInvalid(f"hosts={path}: line {number}: {why}")
        hosts[host] = slots
    if not hosts:
        raise OptionInvalid(f"hosts={path}: it names no host")
    return hosts


def check(options: Mapping[str, str]) -> int:
    """How many ranks have room. LauncherMissing where no host can be used; of one that cannot, a line says so."""
    hosts = read_host_file(Path(options["hosts"]))
    plan = reach.Plan(1, hosts, ssh_words(options), REACH_SECONDS, local.find_worker(), options["hosts"], "")
    faults = reach.faults_of(plan, hosts)
    lines = [f"host {host} {reach.CANNOT} {fault}" for host, fault in faults.items()]
    if len(faults) == len(hosts):
        raise local.LauncherMissing(f"--launcher ssh: no host can be used; {lines[0]}")
    for line in lines:
        print(f"warning: {line}", file=sys.stderr)
    return sum(hosts.values())


def ssh_words(options: Mapping[str, str]) -> list[str]:
    """The command before a host's name."""
    config = ["-F", options["ssh-config"]] if "ssh-config" in options else []
    return ["ssh", *config, "-o", "BatchMode=yes", "-o", f"ConnectTimeout={int(REACH_SECONDS) - 2}"]


@dataclass(frozen=True)
class HostsLaunch:
    """What will be run, and what the program that looks for hosts is told."""

    launch: local.Launch
    plan: reach.Plan


def render(
    *,
    python: str,
    launch: local.Launch,
    prefix: str,
    ranks: int,
    free: Mapping[str, int],
    record: Path,
    job_file: Path,
    options: Mapping[str, str],
) -> HostsLaunch:
    """The launch over hosts with so many free slots.

    Args:
        launch: of so many ranks on one machine (local.render).
        prefix: where MPI is installed, on every host.
        record: the attempt's, whose name the files of hosts have too.
    """
    host_file, plan_file = (str(record.with_name(record.name + suffix)) for suffix in (HOSTS, PLAN))
    mpirun, *rest = launch.argv
    ssh = ssh_words(options)
    words = [mpirun, "--prefix", prefix, "--hostfile", host_file, "--prtemca", "plm_ssh_args", " ".join(ssh[1:]), *rest]
    argv = (python, "-I", "-S", reach.__file__, plan_file, *words)
    worker = launch.argv[launch.argv.index("train") - 1]
    plan = reach.Plan(ranks, dict(free), ssh, REACH_SECONDS, worker, str(job_file), host_file)
    return HostsLaunch(local.Launch(argv, launch.environment), plan)


def free_slots(hosts: Mapping[str, int], host_files: Sequence[Path]) -> dict[str, int]:
    """What the launches with these host files leave; those without one yet take nothing."""
    used = Counter[str]()
    for path in host_files:
        if path.exists():
            used.update(read_host_file(path))
    return {host: max(0, slots - used[host]) for host, slots in hosts.items()}


def make_launcher(
    options: Mapping[str, str],
    mpirun: str,
    worker: str,
    command: Command,
) -> Launcher:
    """Starts `paceline-worker` on the hosts of the host file, which is read again for each launch."""
    cores = local.available_cores()
    running: dict[Path, local.Running] = {}  # by host file

    def start(job: Job, secret: str, folder: JobFolder) -> local.Running:
        arguments, forwarded = command(job, secret, folder)
        record = local.record_of(folder.logs, job.attempt).absolute()
        for path in [path for path, run in running.items() if run.poll() is not None]:
            del running[path]
        try:
            free = free_slots(read_host_file(Path(options["hosts"])), list(running))
        except OptionInvalid as fault:  # it was changed since
            raise local.LauncherMissing(str(fault)) from fault
        rendered = render(
            python=sys.executable,
            launch=local.render(
                mpirun=mpirun, worker=worker, ranks=job.slots, cores=cores, arguments=arguments, forwarded=forwarded
            ),
            prefix=str(Path(mpirun).parents[1]),
            ranks=job.slots,
            free=free,
            record=record,
            job_file=folder.job_file.absolute(),
            options=options,
        )
        folder.logs.mkdir(parents=True, exist_ok=True)
        record.with_name(record.name + PLAN).write_text(json.dumps(rendered.plan._asdict()))
        return note(local.start(rendered.launch, folder.logs, job.attempt, one_machine=False), record)

    def adopt(job: Job, folder: JobFolder) -> local.Running | None:
        found = local.adopt(folder.logs, job.attempt)
        return note(found, local.record_of(folder.logs, job.attempt).absolute()) if found else None

    def note(run: local.Running, record: Path) -> local.Running:
        running[record.with_name(record.name + HOSTS)] = run
        return run

    return Launcher(start, adopt, lambda _, exit_code, logs: local.explain(exit_code, logs))
