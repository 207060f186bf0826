"""Addresses to listen on, and what to say when they are taken."""

from __future__ import annotations

import errno
import ipaddress
import socket
from typing import Any
from urllib.parse import urlsplit

from calotype_server.errors import AddressInUse

__all__ = ["check_free", "in_use", "is_loopback", "resolve"]


def resolve(address: str, option: str) -> list[tuple[socket.AddressFamily, Any]]:
    """Returns every family and socket address that HOST:PORT stands for; localhost stands for several.

    Raises:
        AddressInUse: It stands for none.
    """
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        raise in_use(address, option) from None
    return [(family, target) for family, _, _, _, target in found]


def is_loopback(address: str) -> bool:
    """Whether HOST or HOST:PORT stands for this machine alone, without asking a name server."""
    try:
        host = urlsplit(f"//{address}").hostname or ""
        if host == "localhost" or host.endswith(".localhost"):
            return True
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_free(address: str, option: str) -> None:
    """Raises `AddressInUse` unless every address that HOST:PORT stands for is free.

    gRPC is content when it gets one of them.
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
                    raise in_use(address, option) from None


def in_use(address: str, option: str) -> AddressInUse:
    """Makes the error that tells which option to change."""
    return AddressInUse(
        f"Cannot listen on {address}: it is in use, or not an address of this machine. Stop the other server, "
        f"or choose another address with {option} HOST:PORT (port 0 picks a free one)."
    )
