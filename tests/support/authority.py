"""Certificates for tests: an authority, the files of a server, and the credentials of clients."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

import grpc
import trustme

from calotype import TLS
from calotype_server.transport.net.certificates import Certificates

if TYPE_CHECKING:
    from pathlib import Path


class Authority:
    """An authority, and a folder with the server certificate, which can change while a server runs.

    Args:
        folder: Of the files.
        mutual: Whether clients need a certificate, too.
    """

    def __init__(self, folder: Path, *, mutual: bool = False) -> None:
        self.certificate, self.key, self.ca = folder / "server.pem", folder / "server.key", folder / "ca.pem"
        self.mutual = mutual
        self._root = trustme.CA()
        self._client: trustme.LeafCert | None = self._root.issue_cert("client@example.com") if mutual else None
        self.ca.write_bytes(self.root)
        self.issue()

    @property
    def root(self) -> bytes:
        """The certificate of the authority, PEM."""
        return self._root.cert_pem.bytes()

    def issue(self) -> None:
        """Writes a new certificate for the server."""
        leaf = self._root.issue_cert("localhost", "127.0.0.1")
        self.key.write_bytes(leaf.private_key_pem.bytes())
        self.certificate.write_bytes(b"".join(each.bytes() for each in leaf.cert_chain_pems))

    def renew(self) -> None:
        """Replaces the authority. Clients that trust the old one must reject certificates issued from now on."""
        self._root = trustme.CA()
        self.issue()

    def certificates(self) -> Certificates:
        """Returns the certificates for a port of the server."""
        return Certificates(self.certificate, self.key, self.ca if self.mutual else None)

    def options(self) -> list[str]:
        """Returns the options for `calotype serve`."""
        mutual = ["--tls-client-ca", str(self.ca)] if self.mutual else []
        return ["--tls-certificate", str(self.certificate), "--tls-key", str(self.key), *mutual]

    def tls(self, *, shown: bool = True) -> TLS:
        """Returns the TLS settings for a client; `shown` is whether it sends its certificate, if it has one."""
        if self._client is None or not shown:
            return TLS(root_certificates=self.root)
        chain = b"".join(each.bytes() for each in self._client.cert_chain_pems)
        return TLS(self.root, self._client.private_key_pem.bytes(), chain)

    def credentials(self, *, shown: bool = True) -> grpc.ChannelCredentials:
        """Returns the same for a channel."""
        tls = self.tls(shown=shown)
        return grpc.ssl_channel_credentials(tls.root_certificates, tls.private_key, tls.certificate_chain)

    def context(self, *, shown: bool = True) -> ssl.SSLContext:
        """Returns the same for a socket."""
        context = ssl.create_default_context(cadata=self.root.decode())
        if self._client is not None and shown:
            self._client.configure_cert(context)
        return context
