"""Shares the connections of a port between hosts.

A host may hold a limited number of connections, and a full port makes room for hosts that hold fewer. Only connections
without a request in progress are closed for that: idle ones first, then those that have not sent a request yet.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from calotype_server.transport.net.peers import host_of, share_of
from calotype_server.transport.net.proxies import NO_PROXIES, TrustedProxies

if TYPE_CHECKING:
    from collections.abc import Callable

    from calotype_server.limits import PortLimits

__all__ = ["Connection", "Connections"]


class _State(enum.Enum):
    WAITING = "waiting"  # Has not sent a request yet.
    IDLE = "idle"  # Has been answered, and is kept open for the next request.
    BUSY = "busy"  # Has a request in progress, or is a WebSocket.


class Connection:
    """One open connection, as returned by `Connections.open`. Its protocol reports the state.

    Args:
        owner: Counts it.
        host: The host that it counts for.
        abort: Closes it without waiting for the other end.
    """

    def __init__(self, owner: Connections, host: _Host, abort: Callable[[], None]) -> None:
        self._owner = owner
        self._host = host
        self._abort = abort

    def set_busy(self) -> None:
        """A request has arrived."""
        self._host.move(self, _State.BUSY)

    def set_idle(self) -> None:
        """The last request has been answered."""
        self._host.move(self, _State.IDLE)

    def closed(self) -> None:
        """It no longer counts. Further calls have no effect."""
        self._owner.forget(self, self._host)

    def abort(self) -> None:
        """Closes it to make room for another one."""
        self.closed()
        self._abort()


class Connections:
    """The open connections of a port. Not thread-safe.

    Args:
        limits: Connections of the port, and of each host.
        proxies: Trusted proxies, to which only the limit of the port applies.
    """

    def __init__(self, limits: PortLimits, proxies: TrustedProxies = NO_PROXIES) -> None:
        self._limits = limits
        self._proxies = proxies
        self._hosts: dict[str, _Host] = {}
        self._count = 0

    def open(self, peer: str, abort: Callable[[], None]) -> Connection | None:
        """Counts a new connection. Closes another one if that makes room.

        Args:
            peer: Its canonical peer.
            abort: Closes it without waiting for the other end.

        Returns:
            The connection, or None if it must be rejected.
        """
        trusted = self._proxies.trusts(peer)
        # A proxy counts alone, also if other hosts have an address in its IPv6 network.
        name = host_of(peer) if trusted else share_of(peer)
        host = self._hosts.get(name) or _Host(name, trusted=trusted)
        if not trusted and host.count >= self._limits.max_connections_per_peer and not host.evict(_State.IDLE):
            return None
        if self._count >= self._limits.max_connections and not self._make_room(host):
            return None
        connection = Connection(self, host, abort)
        host.add(connection)
        self._hosts[name] = host
        self._count += 1
        return connection

    def forget(self, connection: Connection, host: _Host) -> None:
        """Stops counting a connection."""
        if host.remove(connection):
            self._count -= 1
            if not host.count:
                del self._hosts[host.name]

    def _make_room(self, newcomer: _Host) -> bool:
        """Closes a connection of the host that holds the most, if that is more than the newcomer.

        If there is none, an idle one of the newcomer makes room. Returns whether a connection was closed.
        """
        larger = [host for host in self._hosts.values() if host.count > newcomer.count and not host.trusted]
        for host in sorted(larger, key=lambda host: -host.count):
            if host.evict(_State.IDLE) or host.evict(_State.WAITING):
                return True
        return newcomer.evict(_State.IDLE)


class _Host:
    """The connections of one host, oldest first in each state."""

    def __init__(self, name: str, *, trusted: bool) -> None:
        self.name = name
        self.trusted = trusted
        self._connections: dict[_State, dict[Connection, None]] = {state: {} for state in _State}

    @property
    def count(self) -> int:
        """Number of connections."""
        return sum(map(len, self._connections.values()))

    def add(self, connection: Connection, state: _State = _State.WAITING) -> None:
        self._connections[state][connection] = None

    def remove(self, connection: Connection) -> bool:
        """Returns whether the connection was still counted."""
        return any(each.pop(connection, connection) is None for each in self._connections.values())

    def move(self, connection: Connection, state: _State) -> None:
        if self.remove(connection):
            self.add(connection, state)

    def evict(self, state: _State) -> bool:
        """Closes the oldest connection in a state. Returns whether there was one."""
        oldest = next(iter(self._connections[state]), None)
        if oldest is not None:
            oldest.abort()
        return oldest is not None
