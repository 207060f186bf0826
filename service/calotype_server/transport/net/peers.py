"""Names hosts the same way on every port, and decides which addresses share a limit.

gRPC and asyncio write the same peer differently: gRPC quotes the brackets of IPv6, and gives zones as numbers. A
listener for both IP versions may see an IPv4 client as `::ffff:192.0.2.1`. All ports use these functions, so that a
host is one caller everywhere.
"""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import unquote

__all__ = ["canonical_host", "canonical_peer", "host_of", "peer_name", "share_of"]

_SHARE_BITS = 64
"""A provider gives each IPv6 customer at least a /64, and its hosts may use any address in it."""


def canonical_host(host: str) -> str | None:
    """Returns an IP address in its shortest notation, or None if `host` is not an IP address.

    An IPv4-mapped address becomes the IPv4 address, and the name of a zone its number.
    """
    address, _, zone = host.removeprefix("[").removesuffix("]").partition("%")
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return None
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return f"{parsed}%{_zone_number(zone)}" if zone else str(parsed)


def peer_name(host: str, port: int | str) -> str:
    """Returns a peer such as `ipv4:127.0.0.1:4711` or `ipv6:[::1]:4711`; `unknown:` if `host` is not an IP address."""
    canonical = canonical_host(host)
    if canonical is None:
        return "unknown:"
    return f"ipv6:[{canonical}]:{port}" if ":" in canonical else f"ipv4:{canonical}:{port}"


def canonical_peer(peer: str) -> str:
    """Returns the peer of a gRPC call as `peer_name` writes it; leaves other kinds, such as `unix:`, unchanged."""
    kind, _, address = unquote(peer).partition(":")
    if kind not in ("ipv4", "ipv6"):
        return peer
    host, _, port = address.rpartition(":")
    return peer_name(host, port)


def host_of(peer: str) -> str:
    """Returns the IP address in a canonical peer, or "" if there is none."""
    return canonical_host(peer.partition(":")[2].rpartition(":")[0]) or ""


def share_of(peer: str) -> str:
    """Returns the name under which limits count a canonical peer: its IPv4 address, or the /64 of its IPv6 address.

    Link-local addresses of all hosts in a network have the same /64, so each of them counts alone.
    """
    host = host_of(peer)
    if ":" not in host:
        return host or peer.rpartition(":")[0]
    address = ipaddress.IPv6Address(host.partition("%")[0])
    if address.is_link_local:
        return host
    return str(ipaddress.IPv6Network((address, _SHARE_BITS), strict=False))


def _zone_number(zone: str) -> str:
    try:
        return zone if zone.isdecimal() else str(socket.if_nametoindex(zone))
    except OSError:
        return zone
