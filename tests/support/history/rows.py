"""Reads the generations of a state folder as facts."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from calotype_server.generations.store import Store
from support.history.facts import SUCCEEDED, Stored

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["copy_state", "stored"]


def copy_state(folder: Path, target: Path) -> None:
    """Copies a state folder as a crash at this moment would leave it, even while a server uses it."""
    target.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.sqlite3*"):
        shutil.copy(path, target)


async def stored(folder: Path) -> AsyncIterator[Stored]:
    """Yields the generations in `folder`. Reads a copy, because a server may use the folder, or read it next."""
    with tempfile.TemporaryDirectory() as copy:
        # Without such a folder, the copy is empty.
        copy_state(folder, Path(copy))
        async with Store.opened(Path(copy)) as store:
            for record in await store.load():
                outcome = image = None
                if record.end is not None:
                    outcome = record.end.error.reason if record.end.error else SUCCEEDED
                    image = await store.image(record.generation_id) if record.end.image else None
                yield Stored(
                    generation=record.generation_id,
                    caller=record.delivery.caller,
                    request_id=record.delivery.request_id,
                    outcome=outcome,
                    image=hashlib.sha256(image).hexdigest() if image else "",
                    attempts=record.attempts,
                )
