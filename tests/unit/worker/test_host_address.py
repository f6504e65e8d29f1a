"""Which of a host's addresses the others can use."""

import socket

from worker.sync.host_address import own_addresses, unambiguous


def test_an_address_that_two_hosts_have_is_none() -> None:
    networks = ["a", "a", "b"]
    lists = [["172.17.0.1", "10.0.0.1"], ["172.17.0.1", "10.0.0.1"], ["172.17.0.1", "10.0.0.2"]]
    assert unambiguous(networks, lists) == [["10.0.0.1"], ["10.0.0.1"], ["10.0.0.2"]]


def test_own_addresses_can_be_listened_on_and_leave_the_loopback_out() -> None:
    for address in own_addresses():
        assert not address.startswith("127.")
        socket.create_server((address, 0)).close()
