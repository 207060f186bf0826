"""Prints SETTINGS.md from the settings themselves: `make settings`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calotype_server.cli.main import default_text, flag_text
from calotype_server.settings import BridgeSettings, Settings

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

HEAD = """# Settings

<!-- Written by `make settings` from calotype_server/settings.py. -->

`calotype serve --help` lists the same. Each option has a variable: `--max-queue` is `CALOTYPE_MAX_QUEUE`. Options win.
Times are in seconds, sizes in bytes. What is marked with * is also an option of `calotype bridge`.

| option | default | |
|---|---|---|"""

BRIDGE = """
Only `calotype bridge` has:

| option | default | |
|---|---|---|"""


def main() -> None:
    """Prints the page."""
    print(HEAD)
    for name, field in Settings.model_fields.items():
        print(_row(name, field, shared=name in BridgeSettings.model_fields))
    print(BRIDGE)
    for name, field in BridgeSettings.model_fields.items():
        if name not in Settings.model_fields:
            print(_row(name, field))


def _row(name: str, field: FieldInfo, *, shared: bool = False) -> str:
    default = default_text(field)
    return f"| `{flag_text(name)}`{'*' * shared} | {f'`{default}`' if default else ''} | {field.description} |"


if __name__ == "__main__":
    main()
