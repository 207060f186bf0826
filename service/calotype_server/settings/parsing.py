"""Reading of the environment, and parsing of settings that are lists or addresses."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from pydantic_settings import EnvSettingsSource

if TYPE_CHECKING:
    from pydantic_settings import BaseSettings

__all__ = ["Environment", "check_address", "check_named", "check_not_blank", "split_list"]


class Environment(EnvSettingsSource):
    """Reads settings from environment variables. A variable without text counts as unset.

    Compose files and templates produce such variables, as in `CALOTYPE_STATE=${STATE}`.

    Args:
        kind: The settings.
        guarded: Names of the settings whose empty variables are kept, so that they fail, because their defaults protect
            less. Otherwise a missing value in a template could turn off keys or encryption.
    """

    def __init__(self, kind: type[BaseSettings], guarded: frozenset[str]) -> None:
        super().__init__(kind)
        prefix = self.env_prefix.lower()
        self.env_vars = {
            name: value
            for name, value in self.env_vars.items()
            if not _is_blank(value) or name.lower().removeprefix(prefix) in guarded
        }


def _is_blank(value: object) -> bool:
    """Returns whether a value is text without any visible character."""
    return isinstance(value, str) and not value.strip()


def check_not_blank(value: object) -> Any:
    """Returns a value unchanged.

    Raises:
        ValueError: It is text without any visible character.
    """
    if _is_blank(value):
        raise ValueError("is empty; give it a value, or leave the option and its variable out")
    return value


def split_list(value: object) -> Any:
    """Splits text at commas, without spaces and empty parts; returns other values unchanged."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def check_named(values: tuple[str, ...]) -> tuple[str, ...]:
    """Returns a list of NAME=VALUE unchanged.

    Raises:
        ValueError: An entry has another form, or a name occurs twice.
    """
    names: set[str] = set()
    for value in values:
        name, _, rest = value.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) or not rest:
            raise ValueError(f"{value!r} is not NAME=VALUE with a name of 1 to 64 letters, digits, dashes, underscores")
        if name in names:
            raise ValueError(f"the name {name!r} is used twice")
        names.add(name)
    return values


def check_address(value: str) -> str:
    """Returns an address unchanged.

    Raises:
        ValueError: It is not HOST:PORT with a port of 0 to 65535.
    """
    host, separator, port = value.rpartition(":")
    if not separator or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{value!r} is not HOST:PORT")
    return value
