"""Resolves and checks the addresses that ports listen on."""

from __future__ import annotations

import errno
import ipaddress
import socket
from typing import Any
from urllib.parse import urlsplit

from calotype_server.errors import AddressInUse

__all__ = ["address_in_use", "check_free", "is_loopback", "resolve"]


def resolve(address: str, option: str) -> list[tuple[socket.AddressFamily, Any]]:
    """Returns the family and socket address of everything that HOST:PORT resolves to; localhost has several.

    Args:
        address: HOST:PORT.
        option: The flag that sets it, for the error.

    Raises:
        AddressInUse: It resolves to nothing.
    """
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        raise address_in_use(address, option) from None
    return [(family, target) for family, _, _, _, target in found]


def is_loopback(address: str) -> bool:
    """Whether HOST or HOST:PORT means this machine only. Does not use DNS."""
    try:
        host = urlsplit(f"//{address}").hostname or ""
        if host == "localhost" or host.endswith(".localhost"):
            return True
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_free(address: str, option: str) -> None:
    """Raises `AddressInUse` unless every address that HOST:PORT resolves to is free.

    gRPC alone is satisfied with one of them.
    """
    if address.endswith(":0"):
        return
    for family, target in resolve(address, option):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(target)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise address_in_use(address, option) from None


def address_in_use(address: str, option: str) -> AddressInUse:
    """Returns the error for an address that cannot be used, which names the flag to change."""
    return AddressInUse(
        f"Cannot listen on {address}: it is in use, or not an address of this machine. Stop the other server, "
        f"or choose another address with {option} HOST:PORT (port 0 picks a free one)."
    )
