"""Options of grpc.aio servers, and of the channels from one of our processes to another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calotype_server.limits import PORT_LIMITS, PortLimits

if TYPE_CHECKING:
    from collections.abc import Sequence

    Options = Sequence[tuple[str, int | str]]

__all__ = ["CHANNEL_OPTIONS", "server_options"]

_MAX_RESPONSE_BYTES = 8 * 1024 * 1024

_CONNECTION_AGE_SHARE = 0.8
"""Maximum age of a connection as a share of the handover time. gRPC adds up to 10 %; the rest is for the client."""


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def server_options(limits: PortLimits) -> Options:
    """Returns the options of a server that applies `limits` to its clients."""
    age = _CONNECTION_AGE_SHARE * limits.handover_seconds
    return [
        # Ends a connection with GOAWAY, for new calls only. No grace period: active calls continue.
        *([("grpc.max_connection_age_ms", _ms(age))] if age else []),
        # A second server on the same port must fail instead of sharing it.
        ("grpc.so_reuseport", 0),
        ("grpc.max_allowed_incoming_connections", limits.max_connections),
        # Clients silently queue calls above this limit, so it is higher than the number of calls that a host may have.
        ("grpc.max_concurrent_streams", 2 * limits.max_calls_per_peer),
        ("grpc.max_receive_message_length", limits.max_request_bytes),
        ("grpc.max_send_message_length", _MAX_RESPONSE_BYTES),
        # Above the first value, gRPC rejects calls at random; above the second, always.
        ("grpc.max_metadata_size", limits.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", limits.max_metadata_bytes),
        ("grpc.server_handshake_timeout_ms", _ms(limits.request_seconds)),
        # Detects dead peers also while nothing is sent; gRPC uses the timeout for TCP_USER_TIMEOUT, too.
        ("grpc.keepalive_time_ms", _ms(limits.keepalive_seconds)),
        ("grpc.keepalive_timeout_ms", _ms(limits.keepalive_timeout_seconds)),
        # Detects frozen processes, for which the kernel still acknowledges packets.
        ("grpc.http2.ping_timeout_ms", _ms(limits.keepalive_timeout_seconds)),
        # Also on connections without calls: of those, one host may hold a whole port.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 5),
        ("grpc.max_connection_idle_ms", _ms(limits.idle_seconds)),
    ]


CHANNEL_OPTIONS: Options = (
    ("grpc.max_receive_message_length", _MAX_RESPONSE_BYTES),
    # A generation may stay in the queue for a long time; pings detect a dead connection meanwhile.
    ("grpc.keepalive_time_ms", _ms(PORT_LIMITS.keepalive_seconds)),
    ("grpc.keepalive_timeout_ms", _ms(PORT_LIMITS.keepalive_timeout_seconds)),
    ("grpc.http2.ping_timeout_ms", _ms(PORT_LIMITS.keepalive_timeout_seconds)),
    ("grpc.http2.max_pings_without_data", 0),
    # Retrying is the caller's decision: a generation that starts twice costs twice.
    ("grpc.enable_retries", 0),
    # Reconnects soon after a server comes back.
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 3_000),
    # Without this, all channels to a server share one connection.
    ("grpc.use_local_subchannel_pool", 1),
)
