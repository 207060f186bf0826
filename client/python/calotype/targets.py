"""Converts addresses of servers to gRPC targets.

Usage::

    from calotype.targets import is_balanced, parse_address, resolve

    target = parse_address("dns:///calotype:50051")
    if is_balanced(target):
        for address, authority in resolve(target):
            ...

A target is what `grpc.insecure_channel` accepts: HOST:PORT, or SCHEME:REST as in gRPC's naming document,
https://github.com/grpc/grpc/blob/master/doc/naming.md.
"""

from __future__ import annotations

import socket

__all__ = ["is_balanced", "parse_address", "resolve"]

_DEFAULT_PORT = 50051
_SCHEMES = ("dns:", "ipv4:", "ipv6:", "unix:", "unix-abstract:", "vsock:", "xds:")


def parse_address(address: str) -> str:
    """Converts an address to a gRPC target.

    Args:
        address: HOST:PORT, HOST (port 50051), or a gRPC target with a scheme, such as unix:/run/calotype.sock. An IPv6
            host may omit its brackets when it has no port.

    Returns:
        HOST:PORT, or the target unchanged.

    Raises:
        ValueError: The address is none of these.
    """
    if not isinstance(address, str) or not address or any(character.isspace() for character in address):
        raise ValueError(f"Expected an address such as localhost:{_DEFAULT_PORT}, not {address!r}")
    if address.startswith(_SCHEMES):
        return address
    if "/" in address:
        raise ValueError(f"Expected HOST:PORT without a scheme or a path, not {address!r}")
    if address.count(":") > 1 and not address.startswith("["):
        address = f"[{address}]"
    host, colon, port = address.rpartition(":")
    if not colon or address.endswith("]"):
        return f"{address}:{_DEFAULT_PORT}"
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"Expected HOST:PORT with a port of 1 to 65535, not {address!r}")
    return address


def is_balanced(target: str) -> bool:
    """Returns whether a target from `parse_address` can stand for several servers: dns:, or a list of IP addresses."""
    scheme, _, rest = target.partition(":")
    return scheme == "dns" or (scheme in ("ipv4", "ipv6") and "," in rest)


def resolve(target: str) -> list[tuple[str, str]]:
    """Finds the servers behind a balanced target. Blocks while the system's resolver looks up a name.

    Args:
        target: A target for which `is_balanced` is true.

    Returns:
        One pair for each server: its own target, and the authority (the host name that its certificate must match).
        Empty when the name cannot be resolved.
    """
    scheme, _, rest = target.partition(":")
    if scheme != "dns":
        return [(f"{scheme}:{address}", address) for address in rest.split(",")]
    authority = rest.rpartition("/")[2]
    host, colon, port = authority.rpartition(":")
    if not colon or authority.endswith("]"):
        host, port = authority, "443"  # gRPC's default
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except OSError:
        return []
    addresses = dict.fromkeys(str(address[0]) for _, _, _, _, address in found)
    return [(f"ipv6:[{ip}]:{port}" if ":" in ip else f"ipv4:{ip}:{port}", authority) for ip in addresses]
