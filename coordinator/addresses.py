"""Addresses a server listens on: what a person wrote, whether it is free, who can reach it."""

from __future__ import annotations

import ipaddress
import os
import socket
from typing import NamedTuple


class AddressUnusable(Exception):
    """Nobody can listen there; the message names the option, the address and the remedy."""


class AddressInvalid(Exception):
    """It is no HOST:PORT."""


class Address(NamedTuple):
    """`str()` gives it as written: an IPv6 host stands in brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether this machine alone can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a host name may be anything
            return False

    def for_this_machine(self) -> Address:
        """What a process here connects to: an address that stands for all of them becomes the loopback one."""
        return Address({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host), self.port)


def parse_address(option: str, text: str) -> Address:
    """The address in `HOST:PORT` or `[IPV6]:PORT`, raising AddressInvalid in the name of the option."""
    host, _, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise AddressInvalid(f"{option}: {text!r} is not HOST:PORT, such as 127.0.0.1:50051 or [::1]:50051")
    return Address(host, int(port))


def check_free(option: str, address: Address) -> None:
    """Raise AddressUnusable, with the system's own reason, when nobody can listen there now.

    gRPC itself says no more than that it could not bind, and prints a page about it.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does: a port just left is free
            probe.bind(place)
            probe.listen()
    except OSError as fault:
        raise unusable(option, address, fault) from fault


def unusable(option: str, address: Address, fault: OSError) -> AddressUnusable:
    """The fault in one line."""
    words = os.strerror(fault.errno) if fault.errno and not isinstance(fault, socket.gaierror) else fault.strerror
    return AddressUnusable(f"{option}: cannot listen on {address}: {words}; choose another with {option} HOST:PORT")
