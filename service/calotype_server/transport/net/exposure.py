"""What stands between the ports and strangers: certificates, keys, and a refusal to listen without them."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

import structlog

from calotype_server.auth.access import Access
from calotype_server.errors import Exposed
from calotype_server.file_watcher import FileWatcher
from calotype_server.transport.net.address import resolve
from calotype_server.transport.net.certificates import Certificates

if TYPE_CHECKING:
    from collections.abc import Mapping

    from calotype_server.settings import WebSettings

__all__ = ["Exposure", "check_exposure"]

_log = structlog.get_logger(__name__)


class Exposure:
    """The keys and certificates of a process, read again when their files change.

    Args:
        settings: What the operator wants.
        addresses: HOST:PORT of each port, by the option that sets it.

    Attributes:
        access: Who may call.
        certificates: Of the ports, or None where they do not encrypt.

    Raises:
        Exposed: It would listen beyond this machine without both.
        KeysUnusable: The file of the keys cannot be used.
        CertificatesUnusable: Nor the certificates.
        AddressInUse: An address is none.
    """

    def __init__(self, settings: WebSettings, addresses: Mapping[str, str]) -> None:
        check_exposure(settings, addresses)
        self.access = Access(settings.api_keys)
        self.certificates: Certificates | None = None
        if settings.tls_certificate is not None and settings.tls_key is not None:
            self.certificates = Certificates(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
        self._watched = [FileWatcher(each.files, each.reload) for each in (self.access, self.certificates) if each]

    def watch(self) -> None:
        """Begins to look at the files."""
        for each in self._watched:
            each.start()

    async def close(self) -> None:
        """Looks no more."""
        for each in self._watched:
            await each.stop()


def check_exposure(settings: WebSettings, addresses: Mapping[str, str]) -> None:
    """Raises `Exposed` when others than this machine could reach a port that lets everybody in.

    Args:
        settings: What the operator wants.
        addresses: HOST:PORT of each port, by the option that sets it.
    """
    missing = []
    if settings.tls_certificate is None:
        missing.append("--tls-certificate FILE --tls-key FILE")
    if not settings.checks_keys:
        missing.append("--api-keys FILE (`calotype keys add --file FILE --name NAME` makes it)")
    exposed = [f"{option} {address}" for option, address in addresses.items() if not _is_loopback(address, option)]
    if not missing or not exposed:
        return
    if settings.insecure:
        _log.warning("strangers may reach this server: --insecure was given", addresses=exposed, missing=missing)
        return
    raise Exposed(
        f"Other machines could reach {' and '.join(exposed)} without {_both(settings)}. Give {' and '.join(missing)};"
        " or listen on 127.0.0.1; or, where something else keeps strangers out, give --insecure."
    )


def _both(settings: WebSettings) -> str:
    lacks = {"encryption": settings.tls_certificate is None, "a key": not settings.checks_keys}
    return " and ".join(what for what, lacking in lacks.items() if lacking)


def _is_loopback(address: str, option: str) -> bool:
    return all(ipaddress.ip_address(target[0].partition("%")[0]).is_loopback for _, target in resolve(address, option))
