"""The certificates of both ports, and of the bridge towards its upstream."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc

from calotype_server.errors import CertificatesUnusable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["Certificates", "upstream_credentials"]


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What new connections get, on either port."""

    context: ssl.SSLContext
    configuration: Any  # grpc.ServerCertificateConfiguration


class Certificates:
    """The server's certificate and key, and who signs those of clients. A reload counts for new connections.

    Args:
        certificate: The server's, PEM, with those between it and the authority.
        key: Its private key, PEM, without a passphrase.
        client_ca: Authorities one of which must have signed a client's certificate (mTLS), PEM; None to ask for none.

    Raises:
        CertificatesUnusable: One cannot be read, or they do not belong together.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None = None) -> None:
        self._certificate = certificate
        self._key = key
        self._client_ca = client_ca
        self._loaded = self._load()

    @property
    def files(self) -> Sequence[Path]:
        """What to `reload` for, when it changes."""
        return [path for path in (self._certificate, self._key, self._client_ca) if path is not None]

    def reload(self) -> None:
        """Reads the files again.

        Raises:
            CertificatesUnusable: As at first; what was read before still holds.
        """
        self._loaded = self._load()

    def ssl_context(self) -> ssl.SSLContext:
        """Returns the context of a port that asyncio listens on."""
        return _Newest(self)

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Returns the credentials of a port that gRPC listens on."""
        served = self._loaded

        def fetch() -> Any:
            # Called by gRPC for each handshake, in threads of its own; None means that nothing has changed.
            nonlocal served
            if served is self._loaded:
                return None
            served = self._loaded
            return served.configuration

        credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
            served.configuration, fetch, require_client_authentication=self._client_ca is not None
        )
        return credentials

    def _load(self) -> _Loaded:
        chain, key = _read(self._certificate, "--tls-certificate"), _read(self._key, "--tls-key")
        authorities = None if self._client_ca is None else _read(self._client_ca, "--tls-client-ca")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.set_alpn_protocols(["http/1.1"])
        try:
            # A key with a passphrase must not make the server ask for it.
            context.load_cert_chain(self._certificate, self._key, password=lambda: "")
        except (OSError, ValueError) as error:
            raise CertificatesUnusable(
                f"--tls-certificate {self._certificate} and --tls-key {self._key} are not a certificate and its key,"
                f" in PEM and without a passphrase ({_why(error)})."
            ) from None
        if authorities is not None:
            try:
                context.load_verify_locations(cadata=authorities.decode("ascii"))
            except (OSError, ValueError) as error:
                raise CertificatesUnusable(
                    f"--tls-client-ca {self._client_ca} holds no certificates in PEM ({_why(error)})."
                ) from None
            context.verify_mode = ssl.CERT_REQUIRED
        configuration = grpc.ssl_server_certificate_configuration([(key, chain)], authorities)
        return _Loaded(context, configuration)


class _Newest(ssl.SSLContext):
    """Stands for the context that was loaded last: asyncio keeps one, and asks it for each connection."""

    _certificates: Certificates

    def __new__(cls, certificates: Certificates) -> _Newest:
        made = super().__new__(cls, ssl.PROTOCOL_TLS_SERVER)
        made._certificates = certificates
        return made

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        return self._certificates._loaded.context.wrap_bio(*args, **kwargs)


def upstream_credentials(
    ca: Path | None = None, certificate: Path | None = None, key: Path | None = None
) -> grpc.ChannelCredentials:
    """Returns what a bridge shows to the server behind it, and whom it trusts.

    Args:
        ca: Authorities to trust, PEM; None for those that come with gRPC.
        certificate: The bridge's own, PEM, for a server that asks for one (mTLS); goes with `key`.
        key: Its private key, PEM.

    Raises:
        CertificatesUnusable: One cannot be read, or they do not belong together.
    """
    if certificate is not None and key is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(certificate, key, password=lambda: "")
        except (OSError, ValueError) as error:
            raise CertificatesUnusable(
                f"--upstream-certificate {certificate} and --upstream-key {key} are not a certificate and its key,"
                f" in PEM and without a passphrase ({_why(error)})."
            ) from None
    return grpc.ssl_channel_credentials(
        None if ca is None else _read(ca, "--upstream-ca"),
        None if key is None else _read(key, "--upstream-key"),
        None if certificate is None else _read(certificate, "--upstream-certificate"),
    )


def _read(path: Path, option: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CertificatesUnusable(f"{option}: {path} cannot be read ({error.strerror}).") from None


def _why(error: Exception) -> str:
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or "not readable"
