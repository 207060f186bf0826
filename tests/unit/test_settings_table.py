"""The page of all settings matches the code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SERVICE = Path(__file__).parents[2] / "service"


def test_the_table_is_up_to_date() -> None:
    """`make settings` would change nothing."""
    command = [sys.executable, str(SERVICE / "settings_table.py")]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert (SERVICE / "SETTINGS.md").read_text() == table, "run `make settings`"
