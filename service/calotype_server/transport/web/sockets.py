"""Listening sockets with dead-peer detection and small send buffers."""

from __future__ import annotations

import math
import socket

from calotype_server.limits import PORT_LIMITS, PortLimits
from calotype_server.transport.net.address import address_in_use, resolve

__all__ = ["listen"]

_SEND_BUFFER_BYTES = 256 * 1024
"""Bounds the memory that the kernel holds for a stalled reader."""


def listen(address: str, limits: PortLimits = PORT_LIMITS, option: str = "--web-address") -> list[socket.socket]:
    """Opens a socket for each address that HOST:PORT resolves to, all with the same port.

    Raises:
        AddressInUse: One of them is in use, or does not belong to this machine.
    """
    sockets: list[socket.socket] = []
    for family, target in resolve(address, option):
        port = sockets[0].getsockname()[1] if sockets else target[1]
        listening = socket.socket(family, socket.SOCK_STREAM)
        sockets.append(listening)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family is socket.AF_INET6:
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            for level, name, value in _socket_options(limits):
                # Accepted connections inherit the options. Some systems lack some of them.
                if hasattr(socket, name):
                    listening.setsockopt(level, getattr(socket, name), value)
            listening.bind((target[0], port, *target[2:]))
            listening.setblocking(False)
        except OSError:
            for opened in sockets:
                opened.close()
            raise address_in_use(address, option) from None
    return sockets


def _socket_options(limits: PortLimits) -> list[tuple[int, str, int]]:
    detection_seconds = limits.keepalive_seconds + limits.keepalive_timeout_seconds
    return [
        # A peer that disappears while nothing is sent is detected after two unanswered keepalive probes, ...
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", math.ceil(limits.keepalive_seconds)),
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", math.ceil(limits.keepalive_timeout_seconds / 2)),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", 2),
        # ... and one that acknowledges nothing, or keeps its window closed, after this time. Also bounds the former.
        (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", math.ceil(1000 * min(limits.stall_seconds, detection_seconds))),
        (socket.IPPROTO_TCP, "TCP_NODELAY", 1),
        (socket.SOL_SOCKET, "SO_SNDBUF", _SEND_BUFFER_BYTES),
    ]
