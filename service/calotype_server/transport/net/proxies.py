"""Finds the client behind trusted proxies.

A proxy appends the address of its client to `X-Forwarded-For`, after entries that the client itself may have sent. So
only entries that a trusted proxy has appended count: the list is read from its end, up to the first address that does
not belong to a trusted proxy. Without trusted proxies the header is ignored.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

from calotype_server.transport.net.peers import canonical_host, host_of, peer_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["FORWARDED_FOR", "NO_PROXIES", "TrustedProxies"]

FORWARDED_FOR = "x-forwarded-for"
"""Name of the header, and of the metadata of a gRPC call."""


class TrustedProxies:
    """The proxies whose `X-Forwarded-For` is believed.

    Args:
        networks: Their IP addresses or networks, such as 10.0.0.0/8.

    Raises:
        ValueError: One of them is neither an address nor a network.
    """

    def __init__(self, networks: Sequence[str] = ()) -> None:
        self._networks = tuple(ipaddress.ip_network(each) for each in networks)

    def trusts(self, peer: str) -> bool:
        """Whether a canonical peer is a trusted proxy."""
        host = host_of(peer).partition("%")[0]
        if not self._networks or not host:
            return False
        address = ipaddress.ip_address(host)
        return any(address in network for network in self._networks)

    def client_of(self, peer: str, forwarded_for: Iterable[str]) -> str:
        """Returns the peer that a request comes from.

        Args:
            peer: The other end of the connection, as a canonical peer.
            forwarded_for: Values of the header `X-Forwarded-For`, in the order in which they arrived.

        Returns:
            `peer`, unless it is a trusted proxy. Then the last address in the list that is not a trusted proxy, with
            port 0. An entry that is not an address ends the search: the request counts as that of its proxy.
        """
        if not self.trusts(peer):
            return peer
        for entry in reversed([each for value in forwarded_for for each in value.split(",")]):
            if (host := _address_in(entry.strip())) is None:
                break
            peer = peer_name(host, 0)
            if not self.trusts(peer):
                break
        return peer


NO_PROXIES = TrustedProxies()


def _address_in(entry: str) -> str | None:
    """Returns the address in an entry, which may have a port: 192.0.2.1:80 or [2001:db8::1]:80."""
    if entry.startswith("["):
        entry = entry[: entry.find("]") + 1]
    elif entry.count(":") == 1:
        entry = entry.partition(":")[0]
    return canonical_host(entry)
