"""Everything an operator can set. Every field is a `calotype serve` flag and a `CALOTYPE_...` variable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

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

    @field_validator("allowed_origins", "allowed_hosts", mode="before")
    @classmethod
    def _separated(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

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

    @field_validator("web_address")
    @classmethod
    def _web_address(cls, value: str) -> str:
        return _host_and_port(value)


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
    max_queue: int = Field(32, ge=0, description="Generations that may wait; one more is refused.")
    preview_max_edge: int = Field(512, ge=16, description="Longer edge of previews at most, in pixels.")
    preview_quality: int = Field(75, ge=1, le=95, description="JPEG quality of previews.")
    drain_seconds: float = Field(30.0, ge=0, description="Time to finish running generations after SIGTERM.")
    cache_dir: Path = Field(
        Path("~/.cache/calotype"), description="Folder for what was measured of a model, such as its preview head."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe lines to log.")
    log_format: Literal["console", "json"] = Field("console", description="Log for people, or for machines.")

    @field_validator("grpc_address")
    @classmethod
    def _grpc_address(cls, value: str) -> str:
        return _host_and_port(value)


class BridgeSettings(WebSettings):
    """Read once, in `bridge`."""

    upstream: str = Field("127.0.0.1:50051", description="HOST:PORT of the Calotype server to pass calls on to.")
    drain_seconds: float = Field(30.0, ge=0, description="Time for running calls to end after SIGTERM.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe lines to log.")
    log_format: Literal["console", "json"] = Field("console", description="Log for people, or for machines.")


def _host_and_port(value: str) -> str:
    host, separator, port = value.rpartition(":")
    if not separator or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{value!r} is not HOST:PORT")
    return value
