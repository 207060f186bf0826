"""The SQLite file of a state folder: its format, and the changes that a server makes.

Each change is one transaction in a write-ahead log that is synced with each commit (`synchronous=FULL`), so it is
durable when its method returns. Rows are found by their number. An index over ids would be one more structure that
damage can make wrong.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from calotype_server import errors
from calotype_server.failpoints import hit
from calotype_server.generations.ids import new_tag
from calotype_server.generations.records import End, Record, dump_end, dump_record, parse_end, parse_record
from calotype_server.generations.state.folder import primary_code, unusable
from calotype_server.generations.state.pages import PAGE_BYTES
from calotype_server.generations.state.seals import Damaged, seal, unseal
from calotype_server.types import Timings

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

__all__ = ["APPLICATION", "VERSION", "FileDamaged", "Row", "StateFile", "read_row"]

VERSION: Final = 2
"""Version of the tables, of the seals and of the meaning of the documents. New fields in documents do not change it."""

APPLICATION: Final = b"cal" + bytes([VERSION])
"""SQLite's application id, in the header of the file. Repeats the version: one that does not match it is damaged."""

_TABLES: Final = (
    """CREATE TABLE generations (
    ordinal INTEGER PRIMARY KEY,
    generation_id TEXT NOT NULL, -- a copy of the one in the record, in case the record is damaged
    record BLOB NOT NULL,        -- a sealed Record in JSON, without its end
    attempts BLOB NOT NULL,      -- a sealed decimal number
    ended BLOB,                  -- a sealed End in JSON
    image BLOB                   -- sealed; the last column, because its pages are read only when it is asked for
)""",
    """CREATE TABLE replica (tag BLOB NOT NULL)""",  # One row: a restarted server keeps the tag that begins its ids.
)

_ENVIRONMENT: Final = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_NOMEM,
    }
)
"""Codes that say nothing about the content of the file. All others mean damage, because the statements are correct."""


class FileDamaged(Exception):
    """The structure of the file is damaged, or another program wrote it. The message is SQLite's first finding."""


@dataclass(frozen=True, slots=True)
class Row:
    """A stored generation.

    Attributes:
        ordinal: Number of the row. Rises with acceptance.
        generation_id: The id in the record, or in its copy if the record is damaged.
        record: The generation; None if the record is damaged. A damaged end is a `DataLoss`.
        damage: The names of the damaged parts.
    """

    ordinal: int
    generation_id: str
    record: Record | None
    damage: tuple[str, ...] = ()


class StateFile:
    """An open file. Not thread-safe; may be used by one thread at a time. The caller holds the folder's `Lock`.

    Args:
        path: The file; created if it does not exist.

    Attributes:
        replica: Tag of the server that owns these generations.

    Raises:
        FileDamaged: The structure of the file is damaged, or another program wrote it.
        StateUnusable: The file cannot be used for another reason; the message says why and what to do.
    """

    replica: str

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            hit("store.open")
            path.touch(mode=0o600)
            self._database = sqlite3.connect(path, timeout=0, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise unusable(path, error) from None
        # Bytes, so that text that is not UTF-8 damages only one record.
        self._database.text_factory = bytes
        try:
            self._prepare()
        except (sqlite3.Error, UnicodeDecodeError) as error:
            # A message of SQLite quotes a damaged table, which may not be UTF-8.
            self._database.close()
            if primary_code(error) in _ENVIRONMENT or (
                primary_code(error) == sqlite3.SQLITE_READONLY and not os.access(path, os.W_OK)
            ):
                raise unusable(path, error) from None
            raise FileDamaged(str(error)) from None
        except BaseException:
            self._database.close()
            raise

    def _prepare(self) -> None:
        execute = self._database.execute
        # Before the first access, so that no other program can open the file.
        execute("PRAGMA locking_mode = EXCLUSIVE")
        execute(f"PRAGMA page_size = {PAGE_BYTES}")
        # Removed prompts and images do not stay in free pages, where a repair would find them.
        execute("PRAGMA secure_delete = ON")
        (version,) = execute("PRAGMA user_version").fetchone()
        tables = [sql.decode(errors="replace") for (sql,) in execute("SELECT sql FROM sqlite_schema") if sql]
        (application,) = execute("PRAGMA application_id").fetchone()
        if version != VERSION and (version or application or tables):
            self._reject_version(version, application)
        if tables and tables != list(_TABLES):
            raise FileDamaged("the tables are not those of Calotype")
        execute("PRAGMA journal_mode = WAL")
        execute("PRAGMA synchronous = FULL")
        if not tables:
            self._create()
        (finding,) = execute("PRAGMA quick_check(1)").fetchone()
        if finding != b"ok":
            raise FileDamaged(finding.decode(errors="replace"))
        # Some damage shows only when something is written.
        self.probe()
        with contextlib.suppress(TypeError, Damaged):
            self.replica = unseal("replica", "", execute("SELECT tag FROM replica").fetchone()[0]).decode()
            return
        raise FileDamaged("the server's tag is damaged")

    def _reject_version(self, version: int, application: int) -> None:
        """Raises an error for a version that is not ours. It is damaged unless the application id confirms it."""
        if not 0 < version < 256 or application not in (0, int.from_bytes(APPLICATION[:3] + bytes([version]))):
            raise FileDamaged("the version is damaged")
        if version > VERSION:
            raise errors.StateUnusable(
                f"--state: {self.path} was written by a newer Calotype. Update this server, or choose another folder."
            )
        raise errors.StateUnusable(
            f"--state: {self.path} was written by an older Calotype that was never released. Choose another folder."
        )

    def _create(self) -> None:
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")
            for table in _TABLES:
                self._database.execute(table)
            self._database.execute(f"PRAGMA application_id = {int.from_bytes(APPLICATION)}")
            self._database.execute(f"PRAGMA user_version = {VERSION}")
            self._database.execute("INSERT INTO replica VALUES (?)", (seal("replica", "", new_tag().encode()),))

    def ordinals(self) -> dict[str, int]:
        """Returns the numbers of all rows by the copies of their ids, which may be damaged."""
        rows = self._database.execute("SELECT generation_id, ordinal FROM generations")
        return {
            copied_id.decode(errors="replace"): ordinal for copied_id, ordinal in rows if isinstance(copied_id, bytes)
        }

    def rows(self) -> Iterator[Row]:
        """Yields all generations, oldest first, without their images."""
        # The last expression makes SQLite check the lengths of all columns.
        query = (
            "SELECT ordinal, generation_id, record, attempts, ended, image IS NULL FROM generations ORDER BY ordinal"
        )
        for ordinal, copied_id, record, attempts, ended, _ in self._database.execute(query):
            yield read_row(ordinal, copied_id, record, attempts, ended)

    def image(self, ordinal: int, generation_id: str) -> bytes | None:
        """Returns the final image of a generation, or None if it has none.

        Raises:
            Damaged: The image is damaged.
        """
        found = self._database.execute("SELECT image FROM generations WHERE ordinal = ?", (ordinal,)).fetchone()
        return None if found is None or found[0] is None else unseal("image", generation_id, found[0])

    def add(self, record: Record) -> int:
        """Adds a generation and returns the number of its row."""
        sealed = seal("record", "", dump_record(record)), _seal_attempts(record.generation_id, record.attempts)
        with self._database:
            statement = "INSERT INTO generations (generation_id, record, attempts) VALUES (?, ?, ?)"
            added = self._database.execute(statement, (record.generation_id, *sealed)).lastrowid
        assert added is not None
        return added

    def set_attempts(self, ordinal: int, generation_id: str, attempts: int) -> None:
        """Changes the number of attempts of a generation."""
        with self._database:
            statement = "UPDATE generations SET attempts = ? WHERE ordinal = ?"
            if not self._database.execute(statement, (_seal_attempts(generation_id, attempts), ordinal)).rowcount:
                raise sqlite3.DatabaseError("a row is missing")

    def end(self, ordinal: int, generation_id: str, end: End, image: bytes | None) -> None:
        """Adds the end and the image of a generation. If it has an end, this does nothing."""
        sealed = (
            seal("end", generation_id, dump_end(end)),
            None if image is None else seal("image", generation_id, image),
        )
        with self._database:
            statement = "UPDATE generations SET ended = ?, image = ? WHERE ordinal = ? AND ended IS NULL"
            if self._database.execute(statement, (*sealed, ordinal)).rowcount:
                return
            if not self._database.execute("SELECT 1 FROM generations WHERE ordinal = ?", (ordinal,)).fetchone():
                raise sqlite3.DatabaseError("a row is missing")

    def remove(self, ordinals: Iterable[int]) -> None:
        """Removes generations."""
        with self._database:
            statement = "DELETE FROM generations WHERE ordinal = ?"
            self._database.executemany(statement, [(ordinal,) for ordinal in ordinals])

    def restore(self, replica: str | None, rows: Iterable[tuple[object, ...]]) -> None:
        """Adds rows as they were read from a damaged file, and sets the server's tag unless it is None."""
        with self._database:
            self._database.executemany("INSERT INTO generations VALUES (?, CAST(? AS TEXT), ?, ?, ?, ?)", rows)
            if replica is not None:
                self._database.execute("UPDATE replica SET tag = ?", (seal("replica", "", replica.encode()),))

    def probe(self) -> None:
        """Makes a durable change that means nothing, to find out whether the disk can be written."""
        with self._database:
            self._database.execute("UPDATE replica SET tag = tag")

    def close(self) -> None:
        """Moves the write-ahead log into the file and closes it."""
        self._database.close()


def read_row(ordinal: int, copied_id: object, record: object, attempts: object, ended: object) -> Row:
    """Checks the columns of a row and returns the generation."""
    readable_id = copied_id.decode(errors="replace") if isinstance(copied_id, bytes) else ""
    try:
        found = parse_record(unseal("record", "", record))
    except ValueError:
        return Row(ordinal, readable_id, None, ("record",))
    damage = [] if readable_id == found.generation_id else ["copy of the id"]
    count, attempts_damaged = _unseal_attempts(found.generation_id, attempts)
    if attempts_damaged:
        damage.append("attempts")
    end = None
    if ended is not None:
        try:
            end = parse_end(unseal("end", found.generation_id, ended))
        except ValueError:
            damage.append("end")
            end = End(found.created, 0, 0, Timings(), error=errors.DataLoss("The stored result is damaged."))
    return Row(ordinal, found.generation_id, replace(found, attempts=count, end=end), tuple(damage))


def _seal_attempts(generation_id: str, attempts: int) -> bytes:
    return seal("attempts", generation_id, str(attempts).encode())


def _unseal_attempts(generation_id: str, stored: object) -> tuple[int, bool]:
    """Returns the number of attempts, and whether it is damaged. It then counts as one: another may follow."""
    try:
        return int(unseal("attempts", generation_id, stored)), False
    except Damaged:
        return 1, True
