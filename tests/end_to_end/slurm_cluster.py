"""A Slurm of one node on loopback: munged, slurmctld and slurmd of Debian's packages, in a folder of their own.

Rules: needs root and the packages; `why_not` says what is missing and how to get it. No file of the machine's own Slurm
is read or written: key, sockets, ports, state and logs are the folder's. No accounting: `sacct` has nothing to tell.
Every wait has a deadline, and what was started is taken down at the end, also after a failure.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

INSTALL = "apt-get install slurm-wlm munge"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")
SEARCHED = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
START_SECONDS = 60.0
STOP_SECONDS = 30.0
COMMAND_SECONDS = 30.0
KILL_WAIT_SECONDS = 10
SETTINGS = """\
ClusterName=paceline-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait={kill_wait}
SlurmctldTimeout=300
SlurmdTimeout=300
NodeName={host} NodeAddr=127.0.0.1 Port={node_port} CPUs={cores}
PartitionName=main Nodes={host} Default=YES MaxTime=60 State=UP
PartitionName=closed Nodes={host} MaxTime=60 State=DOWN
"""


def why_not() -> str | None:
    """Why a Slurm cannot be started here, or None where it can."""
    if missing := [program for program in PROGRAMS if _find(program) is None]:
        return f"{' and '.join(missing)} not found: {INSTALL}"
    return None if os.geteuid() == 0 else "a Slurm of its own needs root: run it as root"


@contextmanager
def slurm_cluster(cores: int) -> Iterator[dict[str, str]]:
    """The variables that make Slurm's commands speak to a cluster with so many cores; it is gone behind the block."""
    with tempfile.TemporaryDirectory(prefix="pl-slurm-") as name, ExitStack() as started:
        folder = Path(name)
        folder.chmod(0o755)  # munged wants its socket to be reachable by all
        for sub_folder in ("state", "spool"):
            (folder / sub_folder).mkdir()
        host = socket.gethostname().split(".")[0]
        controller_port, node_port = _free_ports(2)
        settings = folder / "slurm.conf"
        settings.write_text(
            SETTINGS.format(
                host=host,
                folder=folder,
                controller_port=controller_port,
                node_port=node_port,
                kill_wait=KILL_WAIT_SECONDS,
                cores=cores,
            )
        )
        variables = {"SLURM_CONF": str(settings)}
        _start_munge(folder, started)
        for program in ("slurmctld", "slurmd"):
            options = ("-D", "-c") if program == "slurmctld" else ("-D", "-N", host)
            _start(program, options, folder, started, variables)
        _await_node(host, folder, variables)
        yield variables


def slurm(variables: dict[str, str], program: str, *arguments: str) -> str:
    """What a command of Slurm's says."""
    done = subprocess.run(
        [program, *arguments], env=os.environ | variables, capture_output=True, text=True, timeout=COMMAND_SECONDS
    )
    if done.returncode != 0:
        raise RuntimeError(f"{program} {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def _start_munge(folder: Path, started: ExitStack) -> None:
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    files = [f"--{name}-file={folder / ('munge.' + name)}" for name in ("key", "log", "pid", "seed")]
    _start("munged", ("--foreground", f"--socket={folder / 'munge.socket'}", *files), folder, started, {})
    _until(lambda: (folder / "munge.socket").exists(), "munged", folder)


def _start(program: str, options: tuple[str, ...], folder: Path, started: ExitStack, variables: dict[str, str]) -> None:
    with (folder / f"{program}.out").open("wb") as log:
        process = subprocess.Popen(
            [str(_find(program)), *options],
            env=os.environ | variables,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    started.callback(_stop, process)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(STOP_SECONDS)


def _await_node(host: str, folder: Path, variables: dict[str, str]) -> None:
    def idle() -> bool:
        words = ["sinfo", "-h", "-n", host, "-p", "main", "-o", "%T"]
        done = subprocess.run(
            words, env=os.environ | variables, capture_output=True, text=True, timeout=COMMAND_SECONDS
        )
        return done.stdout.strip() == "idle"

    _until(idle, "slurmctld", folder)


def _until(good: Callable[[], bool], program: str, folder: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not good():
        if time.monotonic() > deadline:
            said = "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted(folder.glob("*.out")))
            raise RuntimeError(f"{program} is not ready within {START_SECONDS:g} s:\n{said}")
        time.sleep(0.05)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as sockets:
        found = [sockets.enter_context(socket.socket()) for _ in range(count)]
        for each in found:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in found]


def _find(program: str) -> str | None:
    return shutil.which(program, path=SEARCHED)
