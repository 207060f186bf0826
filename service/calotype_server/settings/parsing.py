"""Reading of the environment, and parsing of settings that are lists or addresses."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from pydantic_settings import EnvSettingsSource

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pydantic_settings import BaseSettings

__all__ = ["Environment", "check_address", "check_not_blank", "named_values", "split_list", "split_repeated"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


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


def split_repeated(value: object) -> Any:
    """Splits text that is a JSON list, or a list with commas; returns other values unchanged.

    Raises:
        ValueError: The text starts like a JSON list, but is not a list of strings.
    """
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return split_list(value)
    try:
        items = json.loads(value)
    except ValueError:
        raise ValueError("is not valid JSON") from None
    if not (isinstance(items, list) and all(isinstance(item, str) for item in items)):
        raise ValueError("is not a list of strings")
    return tuple(items)


def named_values(items: Iterable[str]) -> dict[str, str]:
    """Returns the values of items of the form NAME=VALUE by their names.

    Raises:
        ValueError: An item has another form, or a name occurs twice.
    """
    found: dict[str, str] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not value.strip():
            raise ValueError(f"{item!r} is not NAME=VALUE")
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} is not a name: 1 to 64 letters, digits, '.', '_' and '-'; the first is not a sign"
            )
        if name in found:
            raise ValueError(f"the name {name!r} occurs twice")
        found[name] = value.strip()
    return found


def check_address(value: str) -> str:
    """Returns an address unchanged.

    Raises:
        ValueError: It is not HOST:PORT with a port of 0 to 65535.
    """
    host, separator, port = value.rpartition(":")
    if not separator or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{value!r} is not HOST:PORT")
    return value
