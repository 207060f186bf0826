"""Protects the ports: certificates, keys, and a check that prevents listening on public addresses without them."""

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
    """The keys and certificates of a process, reloaded when their files change.

    Args:
        settings: The operator's settings.
        addresses: HOST:PORT of each port, by the flag that sets it.

    Attributes:
        access: Checks keys.
        certificates: For the ports, or None for plaintext.

    Raises:
        Exposed: A port would be reachable from other machines without TLS or without keys.
        KeysUnusable: The key file cannot be used.
        CertificatesUnusable: A certificate file cannot be used.
        AddressInUse: An address cannot be resolved.
    """

    def __init__(self, settings: WebSettings, addresses: Mapping[str, str]) -> None:
        check_exposure(settings, addresses)
        self.access = Access(settings.api_keys)
        self.certificates: Certificates | None = None
        if settings.tls_certificate is not None and settings.tls_key is not None:
            self.certificates = Certificates(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
        reloadable = [each for each in (self.access, self.certificates) if each is not None]
        self._watchers = [FileWatcher(each.files, each.reload) for each in reloadable]

    def watch_files(self) -> None:
        """Starts reloading keys and certificates when their files change."""
        for watcher in self._watchers:
            watcher.start()

    async def close(self) -> None:
        """Stops watching the files."""
        for watcher in self._watchers:
            await watcher.stop()


def check_exposure(settings: WebSettings, addresses: Mapping[str, str]) -> None:
    """Raises `Exposed` if other machines could reach a port without TLS or without a key. `--insecure` allows it.

    Args:
        settings: The operator's settings.
        addresses: HOST:PORT of each port, by the flag that sets it.
    """
    missing = []
    if settings.tls_certificate is None:
        missing.append("--tls-certificate FILE --tls-key FILE")
    if not settings.checks_keys:
        missing.append("--api-keys FILE (created by `calotype keys add --file FILE --name NAME`)")
    exposed = [f"{option} {address}" for option, address in addresses.items() if not _is_loopback(address, option)]
    if not missing or not exposed:
        return
    if settings.insecure:
        _log.warning("other machines may reach this server: --insecure is set", addresses=exposed, missing=missing)
        return
    raise Exposed(
        f"Other machines could reach {' and '.join(exposed)} without {_missing_protection(settings)}. Set "
        f"{' and '.join(missing)}; or listen on 127.0.0.1; or, if something else protects the port, set --insecure."
    )


def _missing_protection(settings: WebSettings) -> str:
    missing = {"encryption": settings.tls_certificate is None, "a key": not settings.checks_keys}
    return " and ".join(name for name, is_missing in missing.items() if is_missing)


def _is_loopback(address: str, option: str) -> bool:
    return all(ipaddress.ip_address(target[0].partition("%")[0]).is_loopback for _, target in resolve(address, option))
