"""TLS certificates of the ports, and of the bridge when it connects to its upstream."""

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
    """The certificate and settings of new connections, on either port."""

    context: ssl.SSLContext
    configuration: Any  # grpc.ServerCertificateConfiguration


class Certificates:
    """The server's certificate and key, and the authorities for client certificates. A reload affects new connections.

    Args:
        certificate: PEM file with the server's certificate, followed by any intermediate certificates.
        key: PEM file with its private key, without a passphrase.
        client_ca: PEM file of authorities, one of which must have signed each client's certificate (mTLS). None to
            accept clients without a certificate.

    Raises:
        CertificatesUnusable: A file cannot be read, or the certificate and key do not match.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None = None) -> None:
        self._certificate = certificate
        self._key = key
        self._client_ca = client_ca
        self._loaded = self._load()

    @property
    def files(self) -> Sequence[Path]:
        """Files whose changes call for a `reload`."""
        return [path for path in (self._certificate, self._key, self._client_ca) if path is not None]

    def reload(self) -> None:
        """Reads the files again.

        Raises:
            CertificatesUnusable: A file cannot be used; the certificates that were read before stay in use.
        """
        self._loaded = self._load()

    def ssl_context(self) -> ssl.SSLContext:
        """Returns the TLS context of a port that asyncio listens on."""
        return _ReloadingContext(self)

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Returns the TLS credentials of a port that gRPC listens on."""
        served = self._loaded

        def fetch() -> Any:
            # gRPC calls this for each handshake, in its own threads; None means that nothing has changed.
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
            # Without a password function, OpenSSL would prompt for the passphrase of an encrypted key.
            context.load_cert_chain(self._certificate, self._key, password=lambda: "")
        except (OSError, ValueError) as error:
            raise CertificatesUnusable(
                f"--tls-certificate {self._certificate} and --tls-key {self._key} are not a certificate and its key,"
                f" in PEM and without a passphrase ({_cause(error)})."
            ) from None
        if authorities is not None:
            try:
                context.load_verify_locations(cadata=authorities.decode("ascii"))
            except (OSError, ValueError) as error:
                raise CertificatesUnusable(
                    f"--tls-client-ca {self._client_ca} holds no certificates in PEM ({_cause(error)})."
                ) from None
            context.verify_mode = ssl.CERT_REQUIRED
        configuration = grpc.ssl_server_certificate_configuration([(key, chain)], authorities)
        return _Loaded(context, configuration)


class _ReloadingContext(ssl.SSLContext):
    """Delegates each new connection to the most recently loaded context, since asyncio never replaces its context."""

    _certificates: Certificates

    def __new__(cls, certificates: Certificates) -> _ReloadingContext:
        context = super().__new__(cls, ssl.PROTOCOL_TLS_SERVER)
        context._certificates = certificates
        return context

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        return self._certificates._loaded.context.wrap_bio(*args, **kwargs)


def upstream_credentials(
    ca: Path | None = None, certificate: Path | None = None, key: Path | None = None
) -> grpc.ChannelCredentials:
    """Returns the TLS credentials with which a bridge connects to its upstream servers.

    Args:
        ca: PEM file of authorities to trust; None for those that gRPC ships with.
        certificate: PEM file with the bridge's own certificate, for servers that require one (mTLS); needs `key`.
        key: PEM file with its private key.

    Raises:
        CertificatesUnusable: A file cannot be read, or the certificate and key do not match.
    """
    if certificate is not None and key is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(certificate, key, password=lambda: "")
        except (OSError, ValueError) as error:
            raise CertificatesUnusable(
                f"--upstream-certificate {certificate} and --upstream-key {key} are not a certificate and its key,"
                f" in PEM and without a passphrase ({_cause(error)})."
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


def _cause(error: Exception) -> str:
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or "not readable"
