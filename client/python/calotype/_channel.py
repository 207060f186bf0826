"""Addresses, TLS and channel options. Shared by both clients."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import grpc

from ._version import __version__

__all__ = ["CHANNEL_OPTIONS", "TLS", "call_metadata", "channel_credentials", "parse_address"]

_DEFAULT_PORT = 50051
_SCHEMES = ("dns:", "ipv4:", "ipv6:", "unix:", "unix-abstract:", "vsock:", "xds:")

CHANNEL_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.primary_user_agent", f"calotype-python/{__version__}"),
    ("grpc.max_receive_message_length", 8 * 1024 * 1024),
    # A generation may wait in the queue for minutes without a byte: pings notice a dead link meanwhile.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # What a frozen process is given: the kernel acknowledges for it.
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # No longer than the client itself waits, see `_resume`: its attempts fail at once while the channel waits.
    ("grpc.initial_reconnect_backoff_ms", 250),
    ("grpc.max_reconnect_backoff_ms", 4_000),
    # A generation that was started twice costs twice; the caller decides.
    ("grpc.enable_retries", 0),
)


@dataclass(frozen=True, slots=True)
class TLS:
    """How to encrypt, and whom to trust.

    Usage::

        TLS()  # trusts what browsers trust
        TLS(root_certificates=Path("ca.pem").read_bytes())  # trusts your own authority
        TLS(private_key=key, certificate_chain=chain)  # proves who you are, too

    Attributes:
        root_certificates: Authorities to trust, PEM. Default: those that come with gRPC.
        private_key: Key of the client, PEM. Goes with `certificate_chain`.
        certificate_chain: Certificates of the client, PEM. Goes with `private_key`.
    """

    root_certificates: bytes | None = None
    private_key: bytes | None = field(default=None, repr=False)
    certificate_chain: bytes | None = None

    def __post_init__(self) -> None:
        if (self.private_key is None) != (self.certificate_chain is None):
            raise ValueError("private_key and certificate_chain go together: give both or neither")


def channel_credentials(tls: TLS | bool | None) -> grpc.ChannelCredentials | None:
    """Makes the credentials of a channel; None means that it is not encrypted."""
    if not tls:
        return None
    if tls is True:
        tls = TLS()
    return grpc.ssl_channel_credentials(tls.root_certificates, tls.private_key, tls.certificate_chain)


def call_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """Makes what every call carries: the key, that of the environment when it is None, or nothing when it is empty.

    Raises:
        ValueError: It is not one, such as the name of a file or two keys.
    """
    if api_key is None:
        api_key = os.environ.get("CALOTYPE_API_KEY", "").strip()
    if not api_key.isascii() or not api_key.isprintable() or " " in api_key:
        # Not repeated: whatever it is, it is nobody else's business.
        raise ValueError("An API key has neither spaces nor line breaks nor other than ASCII characters")
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()


def parse_address(address: str) -> str:
    """Turns HOST, HOST:PORT or a target of gRPC's own, such as unix:/run/calotype.sock, into a target.

    Raises:
        ValueError: It is none of these.
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
