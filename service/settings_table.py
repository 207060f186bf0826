"""Prints SETTINGS.md, generated from the settings: `make settings`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calotype_server.cli.options import default_text, flag_text, help_text
from calotype_server.settings import BridgeSettings, Settings

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

HEAD = """# Settings

<!-- Written by `make settings` from calotype_server/settings. -->

`calotype serve --help` prints the same list. Each option has an environment variable: `--max-queue` is
`CALOTYPE_MAX_QUEUE`. Options override variables. An empty variable counts as unset, except where that would turn off
protection: empty variables for keys, certificates and the bridge's TLS are errors. Options marked with * also exist in
`calotype bridge`.

| option | default | meaning |
|---|---|---|"""

BRIDGE = """
Options of `calotype bridge` only:

| option | default | meaning |
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
    return f"| `{flag_text(name)}`{'*' * shared} | {f'`{default}`' if default else ''} | {help_text(field)} |"


if __name__ == "__main__":
    main()
