"""Everything an operator can set. Every field is a `calotype serve` flag and a `CALOTYPE_...` variable."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from calotype._channel import parse_address
from calotype_server.types import PORT_LIMITS, Limits, PortLimits, PreviewMethod, PreviewOptions

__all__ = ["BridgeSettings", "Settings", "WebSettings"]


class WebSettings(BaseSettings):
    """What every process with a web port reads."""

    model_config = SettingsConfigDict(env_prefix="CALOTYPE_", extra="forbid", protected_namespaces=())

    web_address: str = Field("127.0.0.1:8080", description="HOST:PORT for browsers; port 0 picks a free one.")
    allowed_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Pages elsewhere that may call, such as https://example.com; '*' for all. Separated by commas."
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Names under which browsers reach this server, besides localhost and IP addresses; '*' for all. "
        "Separated by commas.",
    )
    metrics_address: str | None = Field(
        None,
        description="HOST:PORT of a port of its own for /metrics, for whoever reaches it. Default: on the web port, "
        "for operators' keys, or without keys for readers on this machine.",
    )
    max_request_bytes: int = Field(
        PORT_LIMITS.max_request_bytes, ge=1024, description="Largest request accepted, in bytes."
    )
    max_metadata_bytes: int = Field(
        PORT_LIMITS.max_metadata_bytes,
        ge=2048,
        description="Most bytes of a call's metadata, or of an HTTP request's line and headers.",
    )
    max_connections: int = Field(
        PORT_LIMITS.max_connections,
        ge=1,
        description="Connections to a port at the same time; one more is closed at once.",
    )
    max_calls_per_peer: int = Field(
        PORT_LIMITS.max_calls_per_peer,
        ge=1,
        description="Calls of one host at the same time, over all ports; one more is refused. "
        "Everybody behind a bridge or a proxy is one host.",
    )
    request_seconds: float = Field(
        PORT_LIMITS.request_seconds,
        ge=0.1,
        description="Time for the head of a request to arrive, and again for its body, in seconds.",
    )
    stall_seconds: float = Field(
        PORT_LIMITS.stall_seconds,
        ge=1,
        description="Time that a browser may take nothing of an answer before it is dropped.",
    )
    idle_seconds: float = Field(
        PORT_LIMITS.idle_seconds, ge=1, description="Time after which a connection without calls is closed."
    )
    keepalive_seconds: float = Field(
        PORT_LIMITS.keepalive_seconds,
        ge=1,
        description="Silence after which a peer is asked whether it is still there.",
    )
    keepalive_timeout_seconds: float = Field(
        PORT_LIMITS.keepalive_timeout_seconds, ge=1, description="Time for it to answer before its calls end."
    )

    @property
    def port_limits(self) -> PortLimits:
        """What peers are held to."""
        return PortLimits(**{field.name: getattr(self, field.name) for field in dataclasses.fields(PortLimits)})

    # Exposure, see `transport.doors`.
    tls_certificate: Path | None = Field(
        None,
        description="Certificate of this server with its chain, in PEM, for TLS on every port. Default: plaintext.",
    )
    tls_key: Path | None = Field(None, description="Private key of the certificate, in PEM, without a passphrase.")
    tls_client_ca: Path | None = Field(
        None, description="Authorities, in PEM, that must have signed the certificate of every client. Default: none."
    )
    api_keys: Path | None = Field(
        None, description="File of the API keys that callers must show; `calotype keys add` makes it. Default: none."
    )
    insecure: bool = Field(
        False, description="Listen beyond this machine without TLS or without keys: something else keeps strangers out."
    )

    @field_validator("allowed_origins", "allowed_hosts", mode="before")
    @classmethod
    def _taken_apart(cls, value: object) -> object:
        return _separated(value)

    @field_validator("allowed_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            parts = urlsplit(origin)
            if origin != "*" and (not parts.netloc or origin != f"{parts.scheme}://{parts.netloc}".lower()):
                raise ValueError(f"{origin!r} is not SCHEME://HOST or SCHEME://HOST:PORT in lower case")
        return value

    @field_validator("allowed_hosts")
    @classmethod
    def _hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for host in value:
            if any(character in host for character in "/:@ "):
                raise ValueError(f"{host!r} is not a host name without scheme and port")
        return value

    @field_validator("tls_certificate", "tls_key", "tls_client_ca", "api_keys")
    @classmethod
    def _at_home(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser()

    @field_validator("web_address")
    @classmethod
    def _web_address(cls, value: str) -> str:
        return _host_and_port(value)

    @field_validator("metrics_address")
    @classmethod
    def _metrics_address(cls, value: str | None) -> str | None:
        return None if value is None else _host_and_port(value)

    @model_validator(mode="after")
    def _certificate_with_key(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("--tls-certificate and --tls-key go together")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("--tls-client-ca needs --tls-certificate and --tls-key")
        return self

    @property
    def checks_keys(self) -> bool:
        """Whether every caller has to show a key."""
        return self.api_keys is not None


class Settings(WebSettings):
    """Read once, in `app`."""

    grpc_address: str = Field("127.0.0.1:50051", description="HOST:PORT for native gRPC; port 0 picks a free one.")
    model: str = Field("bundled", description="'bundled', a hub id such as org/name, or a local diffusers folder.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    variant: str | None = Field(None, description="Weight variant to load, such as fp16.")
    device: str | None = Field(None, description="Torch device, such as cpu or cuda:1. Default: cuda if there is one.")
    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        None, description="Number format of the weights. Default: bfloat16 or float16 on cuda, float32 on cpu."
    )
    threads: int | None = Field(None, ge=1, description="Threads that torch computes with. Default: measured.")
    step_count: int | None = Field(None, ge=1, description="Default denoising steps. Default: the model's.")
    guidance_scale: float | None = Field(None, ge=0, description="Default guidance scale. Default: the model's.")
    max_step_count: int = Field(150, ge=1, description="Largest number of denoising steps accepted.")
    max_pixels: int = Field(2048 * 2048, ge=64, description="Largest width times height accepted.")
    max_prompt_chars: int = Field(4000, ge=1, description="Longest prompt accepted, in characters.")
    max_active: int | None = Field(
        None, ge=1, description="Generations worked on at once. Default: as many as batching pays for, measured."
    )
    max_batch_rows: int | None = Field(
        None,
        ge=1,
        description="Rows of latents computed together at most. Default: as many as pay, measured; "
        "with --deterministic those of four requests.",
    )
    deterministic: bool = Field(
        False, description="Make every picture bitwise the same whoever shares a batch with it, at some cost."
    )
    max_queue: int = Field(32, ge=0, description="Generations that may wait; one more is refused.")
    max_queue_per_caller: int | None = Field(
        None, ge=0, description="Generations of one caller that may wait. Default: max_queue."
    )
    preview_method: PreviewMethod = Field(PreviewMethod.AUTO, description="What draws previews unless a request says.")
    preview_methods: str = Field(
        "head,tiny_vae,full_vae", description="Methods that may be used, with commas between them."
    )
    preview_every_steps: int = Field(1, ge=1, le=1000, description="Steps between previews unless a request says.")
    preview_min_interval: float = Field(
        0.0, ge=0, le=60, description="Least seconds between previews unless a request says."
    )
    preview_edge: int = Field(512, ge=16, description="Longer edge of previews in pixels unless a request says.")
    preview_quality: int = Field(75, ge=1, le=95, description="JPEG quality of previews unless a request says.")
    preview_budget: float = Field(
        0.02, gt=0, le=1, description="Share of the denoiser's time that automatic previews may cost."
    )
    max_preview_edge: int = Field(1024, ge=16, description="Longest edge of previews accepted, in pixels.")
    max_preview_quality: int = Field(95, ge=1, le=95, description="Largest JPEG quality of previews accepted.")
    tiny_vae: str | None = Field(
        None,
        description="AutoencoderTiny that fits the model, for previews: a hub id or folder. "
        "Default: the bundled model's own, none for others.",
    )
    state: Path | None = Field(
        None, description="Folder in which generations are kept, so that they survive a restart. Default: nowhere."
    )
    heartbeat_seconds: float = Field(
        5.0, gt=0, le=5, description="Time without news of a generation after which readers are told that it is alive."
    )
    retain_seconds: float = Field(600.0, ge=0, description="Time for which ended generations can still be watched.")
    retain_count: int = Field(256, ge=0, description="Ended generations kept at most.")
    retain_bytes: int = Field(
        256 * 2**20, ge=0, description="Bytes of pictures kept at most, with the previews of running generations."
    )
    drain_seconds: float = Field(30.0, ge=0, description="Time to finish running generations after SIGTERM.")
    watchdog_seconds: float = Field(
        120.0,
        ge=0,
        description="Time without progress of a generation at work, or 20 of its usual steps, after which the process "
        "ends with code 70; 0 for never.",
    )
    tracing: bool | None = Field(
        None,
        description="Send OpenTelemetry spans, as its own OTEL_... variables say. Default: if they name a destination.",
    )
    cache_dir: Path = Field(
        Path("~/.cache/calotype"), description="Folder for what was measured of a model, such as its preview head."
    )
    measure_again: bool = Field(
        False, description="Ignore the cached batching plan of the model at this start, and measure a new one."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe lines to log.")
    log_format: Literal["console", "json"] = Field("console", description="Log for people, or for machines.")
    log_prompts: bool = Field(False, description="Log what people ask for. Default: no prompt is ever logged.")

    @field_validator("grpc_address")
    @classmethod
    def _grpc_address(cls, value: str) -> str:
        return _host_and_port(value)

    @field_validator("preview_methods")
    @classmethod
    def _known_methods(cls, value: str) -> str:
        known = {PreviewMethod.HEAD, PreviewMethod.TINY_VAE, PreviewMethod.FULL_VAE}
        if not {name.strip() for name in value.split(",") if name.strip()} <= known:
            raise ValueError(f"{value!r} is not a list of {', '.join(sorted(known))}")
        return value

    @model_validator(mode="after")
    def _defaults_within_ceilings(self) -> Self:
        for default, ceiling in (("preview_edge", "max_preview_edge"), ("preview_quality", "max_preview_quality")):
            # A default that was not chosen follows the ceiling that was.
            if getattr(self, default) > getattr(self, ceiling):
                if default in self.model_fields_set:
                    raise ValueError(f"{default} is above {ceiling}")
                setattr(self, default, getattr(self, ceiling))
        chosen = self.preview_method
        if chosen not in (PreviewMethod.AUTO, PreviewMethod.NONE) and chosen not in self.allowed_methods:
            raise ValueError(f"preview_method {chosen} is not among preview_methods")
        return self

    @property
    def allowed_methods(self) -> frozenset[PreviewMethod]:
        """`preview_methods`, taken apart."""
        return frozenset(PreviewMethod(name.strip()) for name in self.preview_methods.split(",") if name.strip())

    @property
    def limits(self) -> Limits:
        """What requests are held to."""
        return Limits(
            max_pixels=self.max_pixels,
            max_step_count=self.max_step_count,
            max_prompt_chars=self.max_prompt_chars,
            max_preview_edge=self.max_preview_edge,
            max_preview_quality=self.max_preview_quality,
            preview=PreviewOptions(
                every_steps=self.preview_every_steps,
                min_interval=self.preview_min_interval,
                max_edge=self.preview_edge,
                quality=self.preview_quality,
                method=self.preview_method,
            ),
            preview_methods=self.allowed_methods,
        )


class BridgeSettings(WebSettings):
    """Read once, in `bridge`."""

    upstream: Annotated[tuple[str, ...], NoDecode] = Field(
        ("127.0.0.1:50051",),
        validate_default=True,
        description="HOST:PORT of the Calotype server to pass calls on to. Several, separated by commas, or a name "
        "with several addresses, such as dns:///calotype:50051, share the work.",
    )
    upstream_tls: bool = Field(False, description="Speak TLS to the upstream, trusting the authorities of gRPC.")
    upstream_ca: Path | None = Field(
        None, description="Authorities to trust for the upstream, in PEM; implies --upstream-tls."
    )
    upstream_certificate: Path | None = Field(
        None, description="The bridge's own certificate, for an upstream that asks for one; implies --upstream-tls."
    )
    upstream_key: Path | None = Field(None, description="Private key of that certificate.")
    upstream_checks_keys: bool = Field(
        False, description="The upstream asks for keys: the bridge passes them on and need not check them itself."
    )
    drain_seconds: float = Field(30.0, ge=0, description="Time for running calls to end after SIGTERM.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe lines to log.")
    log_format: Literal["console", "json"] = Field("console", description="Log for people, or for machines.")

    @field_validator("upstream", mode="before")
    @classmethod
    def _upstream(cls, value: object) -> tuple[str, ...]:
        addresses = _separated(value)
        if not addresses:
            raise ValueError("names no server")
        return tuple(dict.fromkeys(parse_address(address) for address in addresses))

    @model_validator(mode="after")
    def _upstream_certificate_with_key(self) -> Self:
        if (self.upstream_certificate is None) != (self.upstream_key is None):
            raise ValueError("--upstream-certificate and --upstream-key go together")
        return self

    @property
    def checks_keys(self) -> bool:
        """Whether every caller has to show a key, here or at the upstream."""
        return super().checks_keys or self.upstream_checks_keys

    @property
    def encrypts_upstream(self) -> bool:
        """Whether it speaks TLS to the upstream."""
        return self.upstream_tls or self.upstream_ca is not None or self.upstream_certificate is not None


def _separated(value: object) -> Any:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _host_and_port(value: str) -> str:
    host, separator, port = value.rpartition(":")
    if not separator or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{value!r} is not HOST:PORT")
    return value
