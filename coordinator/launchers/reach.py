"""Finds hosts that can take the ranks of a launch, and becomes mpirun there.

It is a program of its own (`python -I -S reach.py PLAN PROGRAM ARGUMENT...`), which the keeper starts in the place of
mpirun: asking hosts takes seconds, and those are not the coordinator's. PLAN is a JSON file (Plan); the chosen hosts go
into the host file that mpirun reads.

Rules: a host that is asked has a deadline. One that cannot be used is named on standard output with why and what to do,
and the others take its ranks where they have room. Nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

UNUSABLE = 69  # EX_UNAVAILABLE of sysexits.h
CANNOT = "cannot be used:"  # in every line about a host, for causes.py
_NO_PROGRAM, _NO_FOLDER = 81, 82  # exit codes of what is run on the host; ssh's own is 255


class Plan(NamedTuple):
    """What is to be found out."""

    ranks: int
    free: Mapping[str, int]  # slots by host, in the order of the host file
    ssh: Sequence[str]  # the command before a host's name
    seconds: float  # for each host's answer
    program: str  # what must be there to be run
    file: str  # what must be there to be read
    host_file: str  # for mpirun


def spread(free: Mapping[str, int], ranks: int) -> dict[str, int] | None:
    """How many ranks go to which host: to one alone if it has room, else to as few as have; None where none have."""
    roomy = [host for host, slots in free.items() if slots >= ranks]
    if roomy:
        return {min(roomy, key=lambda host: free[host]): ranks}
    placed: dict[str, int] = {}
    for host in sorted(free, key=lambda host: -free[host]):
        if here := min(free[host], ranks - sum(placed.values())):
            placed[host] = here
    return placed if sum(placed.values()) == ranks else None


def faults_of(plan: Plan, hosts: Collection[str]) -> dict[str, str]:
    """Why hosts cannot be used, asked all at once; those that can are left out."""
    with ThreadPoolExecutor(max(1, len(hosts))) as threads:
        said = threads.map(lambda host: (host, _fault(plan, host)), hosts)
        return {host: fault for host, fault in said if fault is not None}


def is_here(host: str) -> bool:
    """Whether the name is this machine's own: nobody needs ssh to reach it."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind(address)
            except OSError:
                continue
            return True
    return False


def _fault(plan: Plan, host: str) -> str | None:
    program, file = shlex.quote(plan.program), shlex.quote(plan.file)
    test = f"test -x {program} || exit {_NO_PROGRAM}; test -r {file} || exit {_NO_FOLDER}"
    words = ["sh", "-c", test] if is_here(host) else [*plan.ssh, host, test]
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=plan.seconds
        )
    except subprocess.TimeoutExpired:
        return f"it did not answer ssh within {plan.seconds:g} s: is it up, and its sshd?"
    except OSError as fault:
        return f"ssh cannot be run: {fault.strerror}; install it (Debian: apt-get install openssh-client)"
    if done.returncode == 0:
        return None
    if done.returncode == _NO_PROGRAM:
        return f"it has no {plan.program}: install Paceline there at the same path"
    if done.returncode == _NO_FOLDER:
        return f"it does not see {plan.file}: the state folder must be the same on every host"
    words_said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    said = words_said[-1] if words_said else f"exit code {done.returncode}"
    return f"ssh says: {said}; `{' '.join(plan.ssh)} {host} true` must work without a question"


def main(plan_path: str, argv: list[str]) -> int:
    with open(plan_path) as file:
        plan = Plan(**json.load(file))
    free, asked = dict(plan.free), set[str]()
    while (placed := spread(free, plan.ranks)) is not None and not asked >= placed.keys():
        hosts = placed.keys() - asked
        asked |= hosts
        for host, fault in sorted(faults_of(plan, hosts).items()):
            print(f"host {host} {CANNOT} {fault}", flush=True)
            del free[host]
    if placed is None:
        has = f"{sum(free.values())} slots on {', '.join(free) or 'no host'}"
        print(f"too few slots without it: {plan.ranks} are needed, and there are {has}")
        return UNUSABLE
    with open(f"{plan.host_file}.new", "w") as file:
        file.writelines(f"{host} slots={slots}\n" for host, slots in placed.items())
    os.rename(f"{plan.host_file}.new", plan.host_file)
    try:
        os.execv(argv[0], argv)
    except OSError as fault:
        print(f"cannot run {argv[0]}: {fault.strerror}")
        return UNUSABLE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
