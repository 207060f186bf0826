"""Reads the rows of a state folder as facts."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sqlite3
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from support.history.facts import SUCCEEDED, Stored

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["stored"]

_FILE = "calotype.sqlite3"


def stored(folder: Path) -> Iterator[Stored]:
    """Yields the rows of the state in `folder`. Reads a copy, so that the original keeps its write-ahead log."""
    if not (folder / _FILE).exists():
        return
    with tempfile.TemporaryDirectory() as copy:
        for path in folder.glob(f"{_FILE}*"):
            shutil.copy(path, copy)
        with contextlib.closing(sqlite3.connect(Path(copy) / _FILE)) as database:
            database.row_factory = sqlite3.Row
            if not database.execute("PRAGMA table_info(generations)").fetchall():
                return
            for row in database.execute("SELECT * FROM generations ORDER BY ordinal"):
                yield _fact(row)


def _fact(row: sqlite3.Row) -> Stored:
    record, ended = json.loads(row["record"]), row["ended"] and json.loads(row["ended"])
    delivery, outcome, image = record["delivery"], None, row["image"]
    if ended:
        outcome = ended["error"]["reason"] if ended["error"] else SUCCEEDED
    return Stored(
        generation=row["generation_id"],
        caller=delivery["caller"],
        request_id=delivery["request_id"],
        outcome=outcome,
        image=hashlib.sha256(image).hexdigest() if image else "",
        attempts=row["attempts"] if "attempts" in row.keys() else None,  # noqa: SIM118 - a Row is no mapping
    )
