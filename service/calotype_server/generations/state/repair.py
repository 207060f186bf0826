"""Opens a state file, and repairs a damaged one: its rows are copied to a new file, and the damaged file is kept."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import sqlite3
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import structlog

from calotype_server import errors
from calotype_server.generations.ids import tag_of
from calotype_server.generations.state.file import APPLICATION, FileDamaged, Row, StateFile, read_row
from calotype_server.generations.state.folder import unusable
from calotype_server.generations.state.pages import FoundRow, application_id, read_rows
from calotype_server.generations.state.seals import Damaged, unseal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["Repair", "Salvage", "open_state", "repair", "salvage"]

_log = structlog.get_logger(__name__)

_ID: Final = re.compile(r"[\w.-]{1,64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Repair:
    """The result of a repair.

    Attributes:
        kept: Number of generations in the new file.
        damaged: Those of them that have a damaged part, by id.
        set_aside: The damaged file.
    """

    kept: int
    damaged: tuple[str, ...]
    set_aside: Path


@dataclass(slots=True)
class Salvage:
    """The readable part of a damaged file.

    Attributes:
        rows: Each generation with its index among all rows of the file, oldest first.
        replica: Tag of the server; None if it is lost.
    """

    rows: list[tuple[int, Row]]
    replica: str | None


def open_state(path: Path) -> StateFile:
    """Opens the file, creates it if needed, and repairs it if its structure is damaged. The caller holds the lock.

    Raises:
        StateUnusable: The file cannot be used; the message says why and what to do.
    """
    try:
        return StateFile(path)
    except FileDamaged as error:
        _log.error("the state is damaged and is repaired", file=str(path), finding=str(error))
    done = repair(path)
    _log.error(
        "the state was repaired: generations on lost pages are gone, and the damaged file was set aside",
        kept=done.kept,
        damaged=list(done.damaged),
        set_aside=str(done.set_aside),
    )
    try:
        return StateFile(path)
    except FileDamaged as error:
        raise errors.StateUnusable(f"--state: {path} could not be repaired ({error}). Move it away.") from None


def repair(path: Path) -> Repair:
    """Copies all readable rows to a new file that takes the place of this one. The caller holds the lock.

    Raises:
        StateUnusable: The file is not one of Calotype's, or the new file cannot be written.
    """
    try:
        found = salvage(path)
        if found is None:
            raise errors.StateUnusable(
                f"--state: {path} is damaged or was not written by Calotype. Move it away, or choose another folder."
            )
        return _rebuild(path, found)
    except (OSError, sqlite3.Error) as error:
        raise unusable(path, error) from None


def salvage(path: Path) -> Salvage | None:
    """Finds all readable rows without changing anything. Returns None if the file is not one of Calotype's."""
    best: dict[str, tuple[tuple[bool, int], int, int, Row]] = {}
    replica: str | None = None
    for index, found in enumerate(read_rows(path)):
        if len(found.columns) == 1:
            with contextlib.suppress(Damaged):
                replica = unseal("replica", "", found.columns[0]).decode()
            continue
        row = _generation(found)
        if row is None:
            continue
        # A page may be there twice. An end counts more than its absence.
        worth = row.record is not None and row.record.end is not None and "end" not in row.damage, -len(row.damage)
        if row.generation_id not in best or best[row.generation_id][0] < worth:
            best[row.generation_id] = worth, found.number, index, row
    if not best and replica is None and application_id(path) != APPLICATION:
        return None
    rows = sorted(best.values(), key=lambda each: each[1])
    tags = (tag_of(row.generation_id) for *_, row in rows if row.record is not None)
    return Salvage([(index, row) for _, _, index, row in rows], replica or next(tags, "") or None)


def _generation(found: FoundRow) -> Row | None:
    """Returns a row of the table of generations; None if it belongs to another table or is random bytes."""
    if len(found.columns) != 6:
        return None
    row = read_row(found.number, *found.columns[1:5])
    image = found.columns[5]
    if row.record is not None and image is not None:
        try:
            unseal("image", row.generation_id, image)
        except Damaged:
            row = replace(row, damage=(*row.damage, "image"))
    is_certain = row.record is not None or (found.is_in_leaf and _ID.fullmatch(row.generation_id))
    return row if is_certain else None


def _rebuild(path: Path, salvaged: Salvage) -> Repair:
    new = path.with_name(path.name + ".new")
    log, new_log = (each.with_name(each.name + "-wal") for each in (path, new))
    new.unlink(missing_ok=True)
    new_log.unlink(missing_ok=True)
    file = StateFile(new)
    try:
        file.restore(salvaged.replica, _columns(path, salvaged))
    finally:
        file.close()
    aside = _free_name(path)
    _keep_copy(path, aside)
    if log.exists():
        _keep_copy(log, aside.with_name(aside.name + "-wal"))
        # SQLite would apply it to the new file.
        log.unlink()
    new.replace(path)
    return Repair(len(salvaged.rows), tuple(row.generation_id for _, row in salvaged.rows if row.damage), aside)


def _columns(path: Path, salvaged: Salvage) -> Iterator[tuple[object, ...]]:
    """Yields the columns of the salvaged rows, numbered by age. Reads the images one at a time."""
    ordinals = {index: ordinal for ordinal, (index, _) in enumerate(salvaged.rows, 1)}
    rows = dict(salvaged.rows)
    for index, found in enumerate(read_rows(path)):
        if index in ordinals:
            record, attempts, ended, image = found.columns[2:6]
            yield ordinals[index], rows[index].generation_id.encode(), record or b"", attempts or b"", ended, image


def _free_name(path: Path) -> Path:
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    names = (path.with_name(f"{path.name}.damaged-{stamp}-{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def _keep_copy(path: Path, copy: Path) -> None:
    try:
        os.link(path, copy)
    except OSError:
        # Some file systems have no links.
        shutil.copy2(path, copy)
