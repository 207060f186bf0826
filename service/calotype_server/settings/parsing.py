"""Parsing of settings that are lists or addresses."""

from __future__ import annotations

from typing import Any

__all__ = ["check_address", "split_list"]


def split_list(value: object) -> Any:
    """Splits text at commas, without spaces and empty parts; returns other values unchanged."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def check_address(value: str) -> str:
    """Returns an address unchanged.

    Raises:
        ValueError: It is not HOST:PORT with a port of 0 to 65535.
    """
    host, separator, port = value.rpartition(":")
    if not separator or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{value!r} is not HOST:PORT")
    return value
