"""Reads a whole state file and reports every damaged value."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calotype_server import errors
from calotype_server.generations.state.file import FileDamaged, Row, StateFile
from calotype_server.generations.state.folder import unusable
from calotype_server.generations.state.repair import salvage
from calotype_server.generations.state.seals import Damaged

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Inspection", "inspect"]


@dataclass(frozen=True, slots=True)
class Inspection:
    """The result of `inspect`.

    Attributes:
        structure: SQLite's first finding about the structure of the file; None if it is intact. A damaged structure is
            repaired when a server opens the file.
        count: Number of generations that were found.
        damage: The damaged parts of each damaged generation, by id.
    """

    structure: str | None
    count: int
    damage: tuple[tuple[str, tuple[str, ...]], ...]


def inspect(path: Path) -> Inspection:
    """Reads everything in a file, with all images, and changes no generation. The caller holds the lock.

    Raises:
        StateUnusable: The file is not one of Calotype's, or cannot be read.
    """
    try:
        try:
            file = StateFile(path)
        except FileDamaged as error:
            return _inspect_damaged(path, str(error))
        try:
            found = [(row.generation_id, _damage(file, row)) for row in file.rows()]
        finally:
            file.close()
    except (OSError, sqlite3.Error) as error:
        raise unusable(path, error) from None
    return Inspection(None, len(found), tuple(each for each in found if each[1]))


def _inspect_damaged(path: Path, structure: str) -> Inspection:
    salvaged = salvage(path)
    if salvaged is None:
        raise errors.StateUnusable(f"{path} is damaged or was not written by Calotype.")
    rows = [row for _, row in salvaged.rows]
    return Inspection(structure, len(rows), tuple((row.generation_id, row.damage) for row in rows if row.damage))


def _damage(file: StateFile, row: Row) -> tuple[str, ...]:
    if row.record is None:
        return row.damage
    try:
        file.image(row.ordinal, row.generation_id)
    except (Damaged, sqlite3.DatabaseError):
        return (*row.damage, "image")
    return row.damage
