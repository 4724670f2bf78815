from __future__ import annotations

import socket
from datetime import timedelta

import pytest

from shardline.errors import LaunchError
from shardline.runtime import network
from tests.sockets import listening

SECONDS = timedelta(seconds=10)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1"])
def test_a_store_listens_on_its_address_alone(host):
    if ":" in host and network.addresses(host) and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    store = network.open_store(host, 0, SECONDS)
    assert [(str(address), port) for address, port in listening()] == [(store.host, store.port)]
    other = network.join_store(store.host, store.port, SECONDS)
    other.set("key", "value")
    assert store.get("key") == b"value"
    del other, store
    assert listening() == []  # and it is closed with its last reference


def test_the_port_of_a_closed_store_is_free_at_once():
    for _ in range(3):
        store = network.open_store("127.0.0.1", 0, SECONDS)
        port = store.port
        client = network.join_store("127.0.0.1", port, SECONDS)
        client.set("key", "value")
        del store
        store = network.open_store("127.0.0.1", port, SECONDS)
        assert not store.check(["key"])
        del store, client


def test_what_cannot_be_listened_on_is_said():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=f"127.0.0.1, port {port}: Address already in use. Another program"):
            network.open_store("127.0.0.1", port, SECONDS)
    with pytest.raises(LaunchError, match="must be an address of the machine that rank 0 runs on"):
        network.open_store("203.0.113.1", 0, SECONDS)  # of a network for documentation
    with pytest.raises(LaunchError, match=r"Cannot listen on absent\.invalid"):
        network.open_store("absent.invalid", 0, SECONDS)


def test_the_interface_of_an_address():
    assert network.interface("127.0.0.1") == network.interface("::1") in ("lo", "lo0")
    assert network.interface("203.0.113.1") is None
    assert network.interface("2001:db8::1") is None
    own = network.own_address("192.0.2.1", 9)  # by the way to any other network, if there is one
    if not network.is_loopback(own):
        assert network.interface(own) in [name for _, name in socket.if_nameindex()]


@pytest.mark.parametrize(
    ("host", "found", "private"),
    [
        ("node0", ["127.0.1.1"], True),  # as Debian writes it into /etc/hosts
        ("node0", ["127.0.1.1", "::1"], True),
        ("node0", ["10.0.0.7"], False),
        ("node0", ["127.0.1.1", "10.0.0.7"], False),
        ("node0", [], False),
        ("localhost", ["127.0.0.1"], False),
        ("127.0.0.1", ["127.0.0.1"], False),
    ],
)
def test_a_name_that_only_this_machine_understands(monkeypatch, host, found, private):
    monkeypatch.setattr(network, "addresses", lambda host: found)
    assert network.is_loopback_by_name(host) is private
