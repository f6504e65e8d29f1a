"""Which way jobs are started: on this machine, over ssh, or through another system; and what their workers are told.

Rules: a launcher is a row of LAUNCHERS. What was typed is checked once, before the coordinator serves; a wrong option,
a missing program or a system that does not answer is one line.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from coordinator.addresses import Address
from coordinator.certificates import Certificates
from coordinator.folders import JobFolder, write_atomically
from coordinator.jobs import Job
from coordinator.launchers import kubernetes, local, slurm, ssh
from coordinator.launchers.options import OptionInvalid, read
from coordinator.runs import Command, Launcher
from protos import environment

ADDRESS = "address"  # where workers find the coordinator that is there now; they outlive one

Options = Mapping[str, str]


class Row(NamedTuple):
    """One way to start jobs."""

    options: Mapping[str, str]  # the names --launcher-option takes, and what each is for
    read: Callable[[Options], Options]  # OptionInvalid
    check: Callable[[Options], int]  # that it can be used: OptionInvalid, LauncherMissing; how many ranks have room
    make: Callable[[Options, str, str, Command], Launcher]  # with mpirun, worker, and what a worker is told


@dataclass(frozen=True)
class Choice:
    """What was typed, checked."""

    name: str = "local"
    options: Options = field(default_factory=dict)

    @property
    def elsewhere(self) -> bool:
        """Whether workers may run on other machines."""
        return self.name != "local"

    @property
    def bounded(self) -> bool:
        """Whether more ranks than have room cannot wait or share cores there."""
        return self.name == "ssh"


def choose(name: str, texts: Sequence[str], state: Path) -> tuple[Choice, int]:
    """The launcher that was asked for, and how many ranks have room there. OptionInvalid, LauncherMissing."""
    row = LAUNCHERS.get(name)
    if row is None:
        raise OptionInvalid(f"--launcher: {name} is not one of {', '.join(LAUNCHERS)}")
    try:
        options = row.read(read(name, row.options, texts))
        if (volume := options.get("volume")) and not state.is_relative_to(volume):
            raise OptionInvalid(f"volume={volume}: --state {state} is not below it, so that no pod would see it")
        return Choice(name, options), row.check(options)
    except OptionInvalid as fault:
        raise OptionInvalid(f"--launcher-option: {fault}") from fault


def make_launcher(
    choice: Choice,
    *,
    mpirun: str,
    worker: str,
    state: Path,
    listening: Address,
    certificates: Certificates | None,
    data_roots: Sequence[Path | str],
    job_parameters: int | None,
) -> Launcher:
    """Starts `paceline-worker` in the chosen way, told where the coordinator listens and what its job may do."""
    coordinator = _seen_by_workers(listening, choice)
    address_file = state / ADDRESS
    write_atomically(address_file, f"{coordinator}\n")

    def command(job: Job, secret: str, folder: JobFolder) -> tuple[list[str], dict[str, str]]:
        arguments = ["train", str(folder.job_file), "-o", str(folder.output), "--log-dir", str(folder.logs)]
        if folder.has_checkpoint:
            arguments.append("--resume")
        forwarded = {
            environment.COORDINATOR_ADDRESS: str(coordinator),
            environment.COORDINATOR_ADDRESS_FILE: str(address_file),
            environment.JOB_ID: job.id,
            environment.JOB_ATTEMPT: str(job.attempt),
            environment.JOB_TOKEN: secret,
        }
        if certificates is not None:
            forwarded |= _tls_of_workers(certificates)
        if data_roots:
            forwarded[environment.DATA_ROOTS] = json.dumps([str(root) for root in data_roots])
        if job_parameters:
            forwarded[environment.PARAMETERS_ALLOWED] = str(job_parameters)
        return arguments, forwarded

    return LAUNCHERS[choice.name].make(choice.options, mpirun, worker, command)


def unreachable_warning(listen: Address, choice: Choice) -> str | None:
    """What to tell of a coordinator that workers on other machines could not report to."""
    if not choice.elsewhere or not listen.loopback:
        return None
    return f"only workers on this machine can report to {listen}: give --listen an address that the others reach"


def _seen_by_workers(listening: Address, choice: Choice) -> Address:
    if choice.elsewhere and listening.host in ("0.0.0.0", "::"):
        return Address(socket.getfqdn(), listening.port)
    return listening.for_this_machine()


def _tls_of_workers(certificates: Certificates) -> dict[str, str]:
    """How workers know this coordinator: by its very certificate. Where clients must show one, they show the same."""
    files = certificates.files
    forwarded = {
        environment.COORDINATOR_CERTIFICATE: str(files.certificate.absolute()),
        environment.COORDINATOR_NAME: certificates.name,
    }
    if files.client_ca is not None:
        forwarded[environment.COORDINATOR_KEY] = str(files.key.absolute())
    return forwarded


def _make_local(_: Options, mpirun: str, worker: str, command: Command) -> Launcher:
    cores = local.available_cores()

    def start(job: Job, secret: str, folder: JobFolder) -> local.Running:
        arguments, forwarded = command(job, secret, folder)
        launch = local.render(
            mpirun=mpirun, worker=worker, ranks=job.slots, cores=cores, arguments=arguments, forwarded=forwarded
        )
        return local.start(launch, folder.logs, job.attempt)

    def adopt(job: Job, folder: JobFolder) -> local.Running | None:
        return local.adopt(folder.logs, job.attempt)

    return Launcher(start, adopt, lambda _, exit_code, logs: local.explain(exit_code, logs))


LAUNCHERS: Mapping[str, Row] = MappingProxyType(
    {
        "local": Row({}, lambda options: options, lambda _: local.available_cores(), _make_local),
        "ssh": Row(ssh.OPTIONS, ssh.read_options, ssh.check, ssh.make_launcher),
        "slurm": Row(slurm.OPTIONS, slurm.read_options, slurm.check, slurm.make_launcher),
        "kubernetes": Row(kubernetes.OPTIONS, kubernetes.read_options, kubernetes.check, kubernetes.make_launcher),
    }
)
