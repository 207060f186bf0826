"""A host has one name on every port, and the limits count the addresses that a host may choose from together."""

from __future__ import annotations

import socket

import pytest

from calotype_server.transport.net.credentials import peer_of
from calotype_server.transport.net.peers import canonical_peer, host_of, share_of
from calotype_server.transport.net.proxies import TrustedProxies

LOOPBACK = socket.if_nameindex()[0]
"""Number and name of a network interface."""


@pytest.mark.parametrize(
    ("native", "web", "name"),
    [
        ("ipv4:127.0.0.1:80", "127.0.0.1", "ipv4:127.0.0.1:80"),
        ("ipv6:%5B::1%5D:80", "::1", "ipv6:[::1]:80"),
        ("ipv6:[::1]:80", "0:0:0:0:0:0:0:1", "ipv6:[::1]:80"),
        ("ipv6:%5B::ffff:127.0.0.1%5D:80", "::ffff:127.0.0.1", "ipv4:127.0.0.1:80"),
        ("ipv6:%5B::ffff:7f00:1%5D:80", "::FFFF:7F00:1", "ipv4:127.0.0.1:80"),
        (f"ipv6:%5Bfe80::1%25{LOOPBACK[0]}%5D:80", f"fe80::1%{LOOPBACK[1]}", f"ipv6:[fe80::1%{LOOPBACK[0]}]:80"),
        ("ipv6:%5Bfe80::1%25nonesuch%5D:80", "fe80::1%nonesuch", "ipv6:[fe80::1%nonesuch]:80"),
    ],
)
def test_a_host_has_one_name_on_all_ports(native: str, web: str, name: str) -> None:
    """The native port and the web port name the same host the same way, whatever notation the system uses."""
    assert canonical_peer(native) == peer_of({"client": (web, 80)}) == name


@pytest.mark.parametrize("peer", ["unix:", "unix:/run/calotype", "unknown:", "ray:0", "inproc:1"])
def test_other_peers_keep_their_name(peer: str) -> None:
    """A peer without an IP address is unchanged, and belongs to no host."""
    assert canonical_peer(peer) == peer
    assert host_of(peer) == ""


@pytest.mark.parametrize("client", [None, ("", 0), ("garbage", 1), ("1.2.3", 1), ("[::1", 1)])
def test_a_client_without_an_address_is_unknown(client: tuple[str, int] | None) -> None:
    """All clients of the web port without a valid address are the same caller."""
    assert peer_of({"client": client}) == ("unknown:" if client != ("[::1", 1) else "ipv6:[::1]:1")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("ipv4:192.0.2.1:1", "ipv4:192.0.2.1:2", True),
        ("ipv4:192.0.2.1:1", "ipv4:192.0.2.2:1", False),
        ("ipv6:[2001:db8::1]:1", "ipv6:[2001:db8::ffff:ffff:ffff:ffff]:2", True),
        ("ipv6:[2001:db8::1]:1", "ipv6:[2001:db8:0:1::1]:1", False),
        ("ipv6:[fe80::1%2]:1", "ipv6:[fe80::2%2]:1", False),
        ("ipv6:[fe80::1%2]:1", "ipv6:[fe80::1%3]:1", False),
        ("unix:", "unknown:", False),
    ],
)
def test_limits_count_an_ipv6_network_as_one_host(one: str, other: str, same: bool) -> None:
    """Two addresses in a /64 share a limit, because one host may use them all; link-local addresses do not."""
    assert (share_of(one) == share_of(other)) is same


PROXIES = TrustedProxies(["10.0.0.0/8", "2001:db8::/32", "127.0.0.1"])


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "client"),
    [
        # A stranger names any address.
        ("ipv4:192.0.2.9:1", ["10.1.1.1"], "ipv4:192.0.2.9:1"),
        ("unknown:", ["192.0.2.1"], "unknown:"),
        # A proxy appends the address of its client to what the client sent.
        ("ipv4:10.0.0.1:1", ["192.0.2.1"], "ipv4:192.0.2.1:0"),
        ("ipv4:10.0.0.1:1", ["203.0.113.5, 192.0.2.1"], "ipv4:192.0.2.1:0"),
        ("ipv4:10.0.0.1:1", ["203.0.113.5", "192.0.2.1"], "ipv4:192.0.2.1:0"),
        ("ipv4:10.0.0.1:1", ["203.0.113.5, 10.9.9.9, 192.0.2.1,10.0.0.2"], "ipv4:192.0.2.1:0"),
        ("ipv6:[2001:db8::1]:1", ["::ffff:192.0.2.1"], "ipv4:192.0.2.1:0"),
        ("ipv4:127.0.0.1:1", ["192.0.2.1:4711"], "ipv4:192.0.2.1:0"),
        ("ipv4:127.0.0.1:1", ["[2001:0db9::1]:4711"], "ipv6:[2001:db9::1]:0"),
        ("ipv4:127.0.0.1:1", ["2001:db9::1"], "ipv6:[2001:db9::1]:0"),
        # All addresses are trusted: the first one started the chain.
        ("ipv4:10.0.0.1:1", ["10.0.0.3, 10.0.0.2"], "ipv4:10.0.0.3:0"),
        # The request of a proxy that names no address counts as its own.
        ("ipv4:10.0.0.1:1", [], "ipv4:10.0.0.1:1"),
        ("ipv4:10.0.0.1:1", [""], "ipv4:10.0.0.1:1"),
        ("ipv4:10.0.0.1:1", ["192.0.2.1, unknown"], "ipv4:10.0.0.1:1"),
        ("ipv4:10.0.0.1:1", ["192.0.2.1, x, 10.0.0.2"], "ipv4:10.0.0.2:0"),
        ("ipv4:10.0.0.1:1", ["[::1, ]:80, \x00, " + "9" * 5000], "ipv4:10.0.0.1:1"),
    ],
)
def test_only_trusted_proxies_name_their_client(peer: str, forwarded_for: list[str], client: str) -> None:
    """The client is the last address in the list that is not a trusted proxy; asking again changes nothing."""
    assert PROXIES.client_of(peer, forwarded_for) == client
    assert PROXIES.client_of(client, forwarded_for) == client


def test_without_trusted_proxies_the_header_is_ignored() -> None:
    """By default even a proxy on the same machine is not believed."""
    assert TrustedProxies().client_of("ipv4:127.0.0.1:1", ["192.0.2.1"]) == "ipv4:127.0.0.1:1"
