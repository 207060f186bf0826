"""Settings of every process that has a web port: servers and bridges."""

from __future__ import annotations

import dataclasses
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from calotype_server.limits import PORT_LIMITS, PortLimits
from calotype_server.settings.parsing import Environment, check_address, check_not_blank, split_list

__all__ = ["WebSettings"]


class WebSettings(BaseSettings):
    """Settings of the web port, of TLS, of API keys and of the log.

    Attributes:
        guarded: Names of the settings whose defaults protect less, so that an empty variable is an error.
        lists: Names of the settings that may be empty, because they are lists.
        repeated: Names of the lists whose option is repeated on the command line.
    """

    guarded: ClassVar[frozenset[str]] = frozenset({"api_keys", "tls_certificate", "tls_key", "tls_client_ca"})
    lists: ClassVar[frozenset[str]] = frozenset({"allowed_origins", "allowed_hosts", "trusted_proxies"})
    repeated: ClassVar[frozenset[str]] = frozenset()

    model_config = SettingsConfigDict(env_prefix="CALOTYPE_", extra="forbid", protected_namespaces=())

    web_address: str = Field(
        "127.0.0.1:8080", description="HOST:PORT of the web port, for browsers. Port 0 picks a free one."
    )
    allowed_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Comma-separated origins of other web pages that may call this server, such as "
        "https://example.com; '*' allows all. Default: none.",
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Comma-separated host names under which browsers reach this server; '*' allows all. localhost and "
        "IP addresses are always allowed. Default: none.",
    )
    trusted_proxies: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Comma-separated addresses or networks of proxies and bridges in front of this server, such as "
        "10.0.0.0/8. Their X-Forwarded-For names the caller, and --max-connections-per-peer does not apply to them. "
        "Default: none, and the header is ignored.",
    )
    probe_address: str | None = Field(
        None,
        description="HOST:PORT of a separate plaintext port for /healthz and /readyz, which responds even if clients "
        "fill the other ports. Default: only the web port serves them.",
    )
    metrics_address: str | None = Field(
        None,
        description="HOST:PORT of a separate port for /metrics, open to every client that can connect to it. Default: "
        "/metrics is on the web port, for operators' keys, or without API keys for clients on this machine.",
    )
    max_request_bytes: int = Field(
        PORT_LIMITS.max_request_bytes, ge=1024, description="Maximum size of a request, in bytes."
    )
    max_metadata_bytes: int = Field(
        PORT_LIMITS.max_metadata_bytes,
        ge=2048,
        description="Maximum size of a call's metadata, or of an HTTP request's line and headers, in bytes.",
    )
    max_connections: int = Field(
        PORT_LIMITS.max_connections,
        ge=1,
        description="Maximum open connections per port. A full port closes new ones; the web port first makes room by "
        "closing one without a request, of the host that has the most.",
    )
    max_connections_per_peer: int = Field(
        PORT_LIMITS.max_connections_per_peer,
        ge=1,
        description="Maximum open connections per host on the web port. Above it, the server closes the host's longest "
        "idle connection, or else the new one. Hosts in one IPv6 /64 count as one.",
    )
    max_calls_per_peer: int = Field(
        PORT_LIMITS.max_calls_per_peer,
        ge=1,
        description="Maximum open calls per host, over all ports. The server rejects further ones. All clients behind "
        "one bridge or proxy count as one host, unless --trusted-proxies names it.",
    )
    request_seconds: float = Field(
        PORT_LIMITS.request_seconds,
        ge=0.1,
        description="Timeout for the head of a request to arrive, and again for its body, in seconds.",
    )
    stall_seconds: float = Field(
        PORT_LIMITS.stall_seconds,
        ge=1,
        description="Timeout for a browser that stops reading a response, in seconds. Then its connection is closed.",
    )
    idle_seconds: float = Field(
        PORT_LIMITS.idle_seconds,
        ge=1,
        description="Time in seconds after which the server closes a connection that has no calls.",
    )
    keepalive_seconds: float = Field(
        PORT_LIMITS.keepalive_seconds,
        ge=1,
        description="Time without traffic after which the server pings a client, in seconds.",
    )
    keepalive_timeout_seconds: float = Field(
        PORT_LIMITS.keepalive_timeout_seconds,
        ge=1,
        description="Timeout for the reply to a ping, in seconds. Then the client's calls end.",
    )
    handover_seconds: float = Field(
        PORT_LIMITS.handover_seconds,
        ge=0,
        description="With several servers: time after SIGTERM for clients to move to the others, in seconds. The "
        "server still accepts calls on open connections, renews each connection at least this often, and then drains. "
        "Its gRPC port is open only while it is ready. 0: there is no other server, so the drain begins at once.",
    )
    tls_certificate: Path | None = Field(
        None, description="PEM file with the server's certificate and its chain. Turns on TLS on all ports."
    )
    tls_key: Path | None = Field(
        None, description="PEM file with the private key of the certificate, without a passphrase."
    )
    tls_client_ca: Path | None = Field(
        None,
        description="PEM file with the CAs that must have signed the certificate of every client. Default: clients "
        "need no certificate.",
    )
    api_keys: Path | None = Field(
        None,
        description="File of API keys, made by `calotype keys add`. With it, every caller needs a key. Default: "
        "callers need no key.",
    )
    insecure: bool = Field(
        False,
        description="Allow a public address without TLS or API keys, because something else protects the server.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Lowest level to log: debug, info, warning or error."
    )
    log_format: Literal["console", "json"] = Field(
        "console", description="Format of the log: console for people, json for machines."
    )

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Returns where settings come from: options first, then variables."""
        return init_settings, Environment(settings_cls, cls.guarded)

    @field_validator("*", mode="before")
    @classmethod
    def _check_not_blank(cls, value: object, info: ValidationInfo) -> object:
        return value if info.field_name in cls.lists else check_not_blank(value)

    @field_validator("allowed_origins", "allowed_hosts", "trusted_proxies", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return split_list(value)

    @field_validator("allowed_origins")
    @classmethod
    def _check_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            parts = urlsplit(origin)
            if origin != "*" and (not parts.netloc or origin != f"{parts.scheme}://{parts.netloc}".lower()):
                raise ValueError(f"{origin!r} is not SCHEME://HOST or SCHEME://HOST:PORT in lower case")
        return value

    @field_validator("allowed_hosts")
    @classmethod
    def _check_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for host in value:
            if any(character in host for character in "/:@ "):
                raise ValueError(f"{host!r} is not a host name without scheme and port")
        return value

    @field_validator("trusted_proxies")
    @classmethod
    def _check_proxies(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for proxy in value:
            try:
                ip_network(proxy)
            except ValueError:
                raise ValueError(f"{proxy!r} is not an IP address, or a network such as 10.0.0.0/8") from None
        return value

    @field_validator("tls_certificate", "tls_key", "tls_client_ca", "api_keys")
    @classmethod
    def _expand_home(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser()

    @field_validator("web_address", "probe_address", "metrics_address")
    @classmethod
    def _check_web_addresses(cls, value: str | None) -> str | None:
        return None if value is None else check_address(value)

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("--tls-certificate and --tls-key go together")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("--tls-client-ca needs --tls-certificate and --tls-key")
        return self

    @property
    def port_limits(self) -> PortLimits:
        """Limits on the clients of the ports."""
        return PortLimits(**{field.name: getattr(self, field.name) for field in dataclasses.fields(PortLimits)})

    @property
    def checks_keys(self) -> bool:
        """Whether every caller needs an API key."""
        return self.api_keys is not None
