"""Settings of a bridge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import NoDecode

from calotype.targets import parse_address
from calotype_server.settings.parsing import split_list
from calotype_server.settings.web import WebSettings

__all__ = ["BridgeSettings"]


class BridgeSettings(WebSettings):
    """Settings of `calotype bridge`."""

    guarded: ClassVar[frozenset[str]] = WebSettings.guarded | {
        *("upstream_tls", "upstream_ca", "upstream_certificate", "upstream_key"),
    }

    upstream: Annotated[tuple[str, ...], NoDecode] = Field(
        ("127.0.0.1:50051",),
        validate_default=True,
        description="HOST:PORT of the Calotype server that answers the calls. Calls are balanced over several servers: "
        "separate them by commas, or give a name with several addresses, such as dns:///calotype:50051.",
    )
    upstream_tls: bool = Field(
        False, description="Connect to the upstream with TLS and trust the CAs that gRPC trusts by default."
    )
    upstream_ca: Path | None = Field(
        None, description="PEM file with the CAs to trust for the upstream. Turns on --upstream-tls."
    )
    upstream_certificate: Path | None = Field(
        None,
        description="PEM file with the bridge's certificate, for an upstream that requires one. Turns on "
        "--upstream-tls.",
    )
    upstream_key: Path | None = Field(None, description="PEM file with the private key of that certificate.")
    upstream_checks_keys: bool = Field(
        False, description="Let the upstream check API keys: the bridge forwards them and needs no --api-keys."
    )
    drain_seconds: float = Field(30.0, ge=0, description="Time for open calls to finish after SIGTERM, in seconds.")

    @field_validator("upstream", mode="before")
    @classmethod
    def _parse_upstream(cls, value: object) -> tuple[str, ...]:
        addresses = split_list(value)
        if not addresses:
            raise ValueError("must name at least one server")
        return tuple(dict.fromkeys(parse_address(address) for address in addresses))

    @model_validator(mode="after")
    def _check_upstream_certificate(self) -> Self:
        if (self.upstream_certificate is None) != (self.upstream_key is None):
            raise ValueError("--upstream-certificate and --upstream-key go together")
        return self

    @property
    def checks_keys(self) -> bool:
        """Whether every caller needs an API key, checked here or by the upstream."""
        return super().checks_keys or self.upstream_checks_keys

    @property
    def encrypts_upstream(self) -> bool:
        """Whether the bridge connects to the upstream with TLS."""
        return self.upstream_tls or self.upstream_ca is not None or self.upstream_certificate is not None
