"""The address under which the other hosts of an attempt reach this one, found by trying.

Rules: on one machine it is the loopback's, and nothing listens beyond it. An address that two hosts have, such as a
container bridge's, is none. What is chosen has been connected to by every rank.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from worker.errors import TrainingFault
from worker.sync.world import World

LOOPBACK = "127.0.0.1"
CONNECT_TIMEOUT_SECONDS = 2.0
_SIOCGIFADDR = 0x8915  # linux/sockios.h
_NAME_BYTES = 16  # linux/if.h: IFNAMSIZ


def address_for_peers(world: World) -> str:
    """An IPv4 address of this host that every rank reaches. Collective.

    Raises:
        TrainingFault: there is none; names the host and what was tried.
    """
    networks = world.gather_everywhere(_network())
    if len(set(networks)) == 1:
        return LOOPBACK
    lists = world.gather_everywhere(own_addresses())
    own = unambiguous(networks, lists)[world.rank]
    listeners = [socket.create_server((address, 0)) for address in own]
    try:
        everyones = world.gather_everywhere([list(listener.getsockname()) for listener in listeners])
        reached = world.gather_everywhere([[_reaches(*place) for place in places] for places in everyones])
    finally:
        for listener in listeners:
            listener.close()
    for index, address in enumerate(own):
        if all(of_rank[world.rank][index] for of_rank in reached):
            return address
    raise TrainingFault(
        f"{world.host}: no address of this host can be reached by every rank (tried {', '.join(own) or 'none'}); "
        "open the ports between the hosts, or use sync: all_reduce"
    )


def own_addresses() -> list[str]:
    """The IPv4 address of each interface but the loopback's, in the interfaces' order."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        for _, name in socket.if_nameindex():
            request = struct.pack(f"{_NAME_BYTES}s24x", name.encode()[: _NAME_BYTES - 1])
            try:
                answer = fcntl.ioctl(query, _SIOCGIFADDR, request)
            except OSError:  # an interface without an address
                continue
            found.append(socket.inet_ntoa(answer[20:24]))
    return [address for address in found if not address.startswith("127.")]


def unambiguous(networks: Sequence[str], lists: Sequence[Sequence[str]]) -> list[list[str]]:
    """Each rank's addresses without those that another network has too; ranks of one network list the same."""
    holders = Counter(address for network in set(networks) for address in set(lists[networks.index(network)]))
    return [[address for address in addresses if holders[address] == 1] for addresses in lists]


def _network() -> str:
    """The same for two processes exactly when they share a loopback interface."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/net')}"


def _reaches(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), CONNECT_TIMEOUT_SECONDS).close()
    except OSError:
        return False
    return True
