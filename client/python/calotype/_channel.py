"""Channel options, TLS and call metadata. Shared by both clients."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field

import grpc

from ._version import __version__
from .targets import is_balanced
from .v1 import calotype_pb2 as v1

__all__ = [
    "CHANNEL_OPTIONS",
    "PROBE_TIMEOUT_SECONDS",
    "TLS",
    "Metadata",
    "Options",
    "call_metadata",
    "channel_credentials",
    "channel_options",
]

Options = tuple[tuple[str, int | str], ...]
Metadata = tuple[tuple[str, str], ...]

CHANNEL_OPTIONS: Options = (
    ("grpc.primary_user_agent", f"calotype-python/{__version__}"),
    ("grpc.max_receive_message_length", 8 * 1024 * 1024),
    # A queued generation may exchange no bytes for a while: pings detect a dead connection meanwhile.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Applies to a frozen process, whose kernel still acknowledges TCP segments.
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Shorter than the client's own waits (`_resume`): its attempts fail immediately while the channel is waiting.
    ("grpc.initial_reconnect_backoff_ms", 250),
    ("grpc.max_reconnect_backoff_ms", 4_000),
    # gRPC must not retry: a generation that starts twice costs twice. `_resume` retries with a request id.
    ("grpc.enable_retries", 0),
)

PROBE_TIMEOUT_SECONDS = 2.0
"""How long one of several servers may take to identify itself. A frozen server is skipped after this."""

_SERVICE = v1.DESCRIPTOR.services_by_name["GenerationService"].full_name
_SERVICE_CONFIG = json.dumps(
    {
        "loadBalancingConfig": [{"round_robin": {}}],
        # A server that is loading its model or draining gets no new generations:
        # https://github.com/grpc/grpc/blob/master/doc/health-checking.md
        "healthCheckConfig": {"serviceName": _SERVICE},
    }
)


@dataclass(frozen=True, slots=True)
class TLS:
    """Encrypts the connection, and chooses which certificates to trust.

    Usage::

        TLS()  # trusts the public certificate authorities
        TLS(root_certificates=Path("ca.pem").read_bytes())  # trusts your own authority
        TLS(private_key=key, certificate_chain=chain)  # also proves the client's identity

    Attributes:
        root_certificates: Certificate authorities to trust, PEM. Default: those that come with gRPC.
        private_key: Private key of the client, PEM. Requires `certificate_chain`.
        certificate_chain: Certificates of the client, PEM. Requires `private_key`.

    Raises:
        ValueError: Only one of `private_key` and `certificate_chain` is set.
    """

    root_certificates: bytes | None = None
    private_key: bytes | None = field(default=None, repr=False)
    certificate_chain: bytes | None = None

    def __post_init__(self) -> None:
        if (self.private_key is None) != (self.certificate_chain is None):
            raise ValueError("private_key and certificate_chain go together: give both or neither")


def channel_options(target: str) -> Options:
    """Returns the options of a channel. A channel to several servers distributes calls round-robin."""
    return (*CHANNEL_OPTIONS, ("grpc.service_config", _SERVICE_CONFIG)) if is_balanced(target) else CHANNEL_OPTIONS


def channel_credentials(tls: TLS | bool | None) -> grpc.ChannelCredentials | None:
    """Makes the credentials of a channel. None means an unencrypted connection."""
    if not tls:
        return None
    if tls is True:
        tls = TLS()
    return grpc.ssl_channel_credentials(tls.root_certificates, tls.private_key, tls.certificate_chain)


def call_metadata(api_key: str | None) -> Metadata:
    """Makes the metadata of every call: the API key, if there is one.

    Args:
        api_key: The key. None uses CALOTYPE_API_KEY from the environment; an empty string sends no key.

    Raises:
        ValueError: The value cannot be a key, for example because it contains a space.
    """
    if api_key is None:
        api_key = os.environ.get("CALOTYPE_API_KEY", "").strip()
    if not api_key.isascii() or not api_key.isprintable() or " " in api_key:
        # The message omits the value: it may be another secret, pasted by mistake.
        raise ValueError("An API key must be printable ASCII without spaces or line breaks")
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()
