"""How the hosts of a port share its connections, without sockets."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest

from calotype_server.limits import PortLimits
from calotype_server.transport.net.proxies import TrustedProxies
from calotype_server.transport.web.connections import Connections

if TYPE_CHECKING:
    from calotype_server.transport.web.connections import Connection

PROXY = "ipv4:10.0.0.1:1"


@dataclasses.dataclass
class Port:
    """A port with room for eight connections, four per host, whose aborted connections are recorded."""

    connections: Connections = dataclasses.field(
        default_factory=lambda: Connections(
            PortLimits(max_connections=8, max_connections_per_peer=4), TrustedProxies(["10.0.0.1"])
        )
    )
    aborted: list[str] = dataclasses.field(default_factory=list)

    def open(self, name: str, peer: str) -> Connection | None:
        """Opens a connection; `name` identifies it in `aborted`."""
        return self.connections.open(peer, lambda: self.aborted.append(name))

    def fill(self, host: str, count: int = 4) -> list[Connection]:
        """Opens connections named a0, a1, ... for host `ipv4:a`."""
        opened = [self.open(f"{host[-1]}{number}", host) for number in range(count)]
        assert None not in opened
        return opened


def peer(letter: str) -> str:
    """Returns the peer of the host with that letter."""
    return f"ipv4:192.0.2.{ord(letter)}:{letter}"


@pytest.fixture
def port() -> Port:
    """An empty port."""
    return Port()


def test_a_host_has_a_limited_number_of_connections(port: Port) -> None:
    """Above its limit, a host gets no further connection until one closes; other hosts do."""
    first, *_ = port.fill(peer("a"))
    assert port.open("a4", peer("a")) is None
    assert port.open("b0", peer("b")) is not None
    first.closed()
    first.closed()
    assert port.open("a5", peer("a")) is not None
    assert port.open("a6", peer("a")) is None
    assert port.aborted == []


def test_an_idle_connection_makes_room_for_a_new_one_of_its_host(port: Port) -> None:
    """The connection that has been idle for the longest is closed, not one with a request or one that just opened."""
    first, second, third, _ = port.fill(peer("a"))
    for each in (first, second, third):
        each.set_busy()
    second.set_idle()
    first.set_idle()
    assert port.open("a4", peer("a")) is not None
    assert port.open("a5", peer("a")) is not None
    assert port.open("a6", peer("a")) is None
    assert port.aborted == ["a1", "a0"]


def test_a_full_port_takes_from_the_host_with_the_most(port: Port) -> None:
    """A host with fewer connections replaces one without a request; a host with as many as the others does not."""
    port.fill(peer("a"), 4)
    *_, busy = port.fill(peer("b"), 3)
    busy.set_busy()
    port.fill(peer("c"), 1)
    assert port.open("c1", peer("c")) is not None
    assert port.open("d0", peer("d")) is not None
    assert port.aborted == ["a0", "a1"]
    assert port.open("d1", peer("d")) is not None
    # Hosts a, b, c and d have two each.
    assert len(port.aborted) == 3
    assert port.open("c2", peer("c")) is None


def test_requests_in_progress_are_never_closed(port: Port) -> None:
    """If all connections have a request in progress, the new one is rejected, also that of a host without any."""
    for each in [*port.fill(peer("a")), *port.fill(peer("b"))]:
        each.set_busy()
    assert port.open("c0", peer("c")) is None
    assert port.aborted == []


def test_a_trusted_proxy_may_use_the_whole_port(port: Port) -> None:
    """The limit of a host does not apply to a trusted proxy, and its connections are not closed for others."""
    for number in range(8):
        assert port.open(f"p{number}", PROXY) is not None
    assert port.open("a0", peer("a")) is None
    assert port.open("p8", PROXY) is None
    assert port.aborted == []


@pytest.mark.parametrize("host", [PROXY, peer("a")], ids=["proxy", "host"])
def test_a_host_that_holds_the_whole_port_replaces_its_idle_connections(host: str) -> None:
    """Its new connection takes the place of its idle one, even if no other host is connected."""
    port = Port(Connections(PortLimits(max_connections=2, max_connections_per_peer=2), TrustedProxies(["10.0.0.1"])))
    first = port.open("0", host)
    first.set_idle()
    assert port.open("1", host) is not None
    assert port.open("2", host) is not None
    assert port.open("3", host) is None
    assert port.aborted == ["0"]


@pytest.mark.parametrize("size", [1, 3])
def test_a_host_still_counts_after_its_only_connection_was_replaced(size: int) -> None:
    """It cannot exceed its limit by replacing connections, and it keeps its place."""
    connections = Connections(PortLimits(max_connections=size, max_connections_per_peer=1))
    for _ in range(3):
        opened = connections.open(peer("a"), lambda: None)
        assert opened is not None
        opened.set_idle()
    opened.set_busy()
    assert connections.open(peer("a"), lambda: None) is None
    opened.closed()
    assert connections.open(peer("a"), lambda: None) is not None


def test_a_trusted_proxy_does_not_count_for_its_neighbours() -> None:
    """A host in the same IPv6 /64 as a trusted proxy has its own limit, and gains no trust."""
    limits = PortLimits(max_connections=8, max_connections_per_peer=1)
    port = Port(Connections(limits, TrustedProxies(["2001:db8::1"])))
    for number in range(3):
        assert port.open(f"p{number}", "ipv6:[2001:db8::1]:1") is not None
    assert port.open("n0", "ipv6:[2001:db8::2]:1") is not None
    assert port.open("n1", "ipv6:[2001:db8::3]:1") is None
    assert port.aborted == []
