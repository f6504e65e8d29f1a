"""Addresses to listen on."""

import socket

import pytest

from coordinator.addresses import Address, AddressInvalid, AddressUnusable, check_free, parse_address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:50051", Address("127.0.0.1", 50051)),
        ("localhost:0", Address("localhost", 0)),
        ("[::1]:50051", Address("::1", 50051)),
    ],
)
def test_an_address_reads_back_as_it_is_written(text: str, address: Address) -> None:
    assert parse_address("--listen", text) == address
    assert str(address) == text


@pytest.mark.parametrize("text", ["", "127.0.0.1", "50051", ":50051", "::1:50051", "host:", "host:x", "host:70000"])
def test_what_is_no_address_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(AddressInvalid, match="is not HOST:PORT, such as"):
        parse_address("--listen", text)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_only_loopback_keeps_others_out(host: str, loopback: bool) -> None:
    assert Address(host, 1).loopback is loopback


def test_workers_connect_to_loopback_where_the_server_listens_everywhere() -> None:
    assert str(Address("0.0.0.0", 5).for_this_machine()) == "127.0.0.1:5"
    assert str(Address("::", 5).for_this_machine()) == "[::1]:5"
    assert str(Address("10.0.0.7", 5).for_this_machine()) == "10.0.0.7:5"


def test_a_taken_port_is_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = Address(*taken.getsockname())
        with pytest.raises(AddressUnusable) as refused:
            check_free("--listen", address)
    assert str(refused.value) == (
        f"--listen: cannot listen on {address}: Address already in use; choose another with --listen HOST:PORT"
    )
    check_free("--listen", Address("127.0.0.1", 0))
