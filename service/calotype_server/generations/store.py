"""What survives a restart: every accepted generation, and how it ended. One SQLite file; optional.

What a method has returned for is on disk, whatever happens then: the file is written ahead (WAL) and synced with each
change (`synchronous=FULL`), and each change is one transaction.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from calotype_server import errors
from calotype_server.generations.ids import new_tag
from calotype_server.generations.records import End, ImageFacts, Record, dump_end, dump_record, parse
from calotype_server.types import Failed, Succeeded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

__all__ = ["Store"]

_log = structlog.get_logger(__name__)

_FILE = "calotype.sqlite3"

_VERSION = 1
"""Of the tables and of what the documents in them mean. Fields may be added to the documents without a new one."""

_TABLES = """
CREATE TABLE IF NOT EXISTS generations (
    ordinal INTEGER PRIMARY KEY,
    generation_id TEXT NOT NULL UNIQUE,
    record TEXT NOT NULL, -- a Record without its end, in JSON
    ended TEXT,           -- an End in JSON
    image BLOB            -- the last column: pages of a large value are read only when it is asked for
)
"""

_REPLICA = "CREATE TABLE IF NOT EXISTS replica (tag TEXT NOT NULL)"
"""Of one row: who restores the generations is known under the same tag as who has begun them."""

_RETRY_SECONDS = 5.0

T = TypeVar("T")


class Store:
    """Keeps generations in a folder; made by `open`.

    All methods are for the event loop: a thread of the store's own does the work, one call after another. A call that
    is cancelled may have been carried out or not.

    Attributes:
        replica: Tag of the server whose generations these are.
    """

    replica: str

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._thread = ThreadPoolExecutor(1, "calotype-store")
        self._database: sqlite3.Connection

    @classmethod
    async def open(cls, folder: Path) -> Store:
        """Opens the state in `folder`, which is made if need be. Nobody else can open it until `close`, or our death.

        Raises:
            StateUnusable: It cannot be used; the text says why and what to do.
        """
        store = cls(folder)
        try:
            await store._run(store._open)
        except BaseException:
            store._thread.shutdown()
            raise
        return store

    async def accept(self, record: Record) -> None:
        """Keeps an accepted generation, which must be new.

        Raises:
            StateUnavailable: It could not be written.
        """
        await self._write(
            "INSERT INTO generations (generation_id, record) VALUES (?, ?)",
            lambda: [(record.generation_id, dump_record(record))],
        )

    async def end(self, generation_id: str, end: Succeeded | Failed, *, step: int, total_steps: int) -> None:
        """Keeps how a generation ended, with its image. The first end counts; an id that is not kept is ignored.

        Raises:
            StateUnavailable: It could not be written.
        """
        image = end.image if isinstance(end, Succeeded) else None
        told = End(
            at=time.time(),
            step=step,
            total_steps=total_steps,
            timings=end.timings,
            finished_early=isinstance(end, Succeeded) and end.finished_early,
            image=None if image is None else ImageFacts(image.format, image.width, image.height, len(image.data)),
            error=end.error if isinstance(end, Failed) else None,
        )
        await self._write(
            "UPDATE generations SET ended = ?, image = ? WHERE generation_id = ? AND ended IS NULL",
            lambda: [(dump_end(told), image and image.data, generation_id)],
        )

    async def forget(self, generation_ids: Iterable[str]) -> None:
        """Drops generations; ids that are not kept are ignored.

        Raises:
            StateUnavailable: It could not be written.
        """
        ids = [(each,) for each in generation_ids]
        await self._write("DELETE FROM generations WHERE generation_id = ?", lambda: ids)

    async def load(self) -> list[Record]:
        """Returns all that is kept, the oldest first, without the images. What cannot be read is left out, and logged.

        Raises:
            StateUnusable: The file is damaged.
        """
        return await self._run(self._load)

    async def image(self, generation_id: str) -> bytes | None:
        """Returns the final image, or None when none is kept.

        Raises:
            StateUnavailable: It could not be read.
        """

        def read() -> bytes | None:
            query = "SELECT image FROM generations WHERE generation_id = ?"
            with _told():
                found: tuple[bytes | None] | None = self._database.execute(query, (generation_id,)).fetchone()
            return None if found is None else found[0]

        return await self._run(read)

    async def close(self) -> None:
        """Closes the file after what is under way; others can open it then."""
        await self._run(self._database.close)
        self._thread.shutdown()

    async def _run(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def _write(self, statement: str, rows: Callable[[], list[tuple[Any, ...]]]) -> None:
        def write() -> None:
            with _told(), self._database:
                self._database.executemany(statement, rows())

        await self._run(write)

    def _open(self) -> None:
        path = self._folder / _FILE
        try:
            # Prompts and pictures are their owner's business.
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.touch(mode=0o600)
            self._database = sqlite3.connect(path, timeout=0)
            # Text that is not UTF-8 is damage to one record.
            self._database.text_factory = bytes
        except (OSError, sqlite3.Error) as error:
            raise _unusable(path, error) from None
        try:
            self._prepare(path)
        except sqlite3.Error as error:
            self._database.close()
            raise _unusable(path, error) from None
        except errors.StateUnusable:
            self._database.close()
            raise

    def _prepare(self, path: Path) -> None:
        # Before the first access: the lock is then kept until the connection is closed, or the process is gone.
        self._database.execute("PRAGMA locking_mode = EXCLUSIVE")
        (version,) = self._database.execute("PRAGMA user_version").fetchone()
        if version > _VERSION:
            raise errors.StateUnusable(
                f"--state: {path} was written by a newer Calotype. Update this one, or name another folder."
            )
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")
            self._database.execute(_TABLES)
            self._database.execute(_REPLICA)
            tag = self._database.execute("SELECT tag FROM replica").fetchone()
            self.replica = new_tag() if tag is None else tag[0].decode()
            if tag is None:
                self._database.execute("INSERT INTO replica VALUES (?)", (self.replica,))
            self._database.execute(f"PRAGMA user_version = {_VERSION}")

    def _load(self) -> list[Record]:
        records = []
        try:
            rows = self._database.execute("SELECT generation_id, record, ended FROM generations ORDER BY ordinal")
            for generation_id, record, ended in rows:
                try:
                    records.append(parse(record, ended))
                except ValueError:
                    # Why is not told: it would quote the prompt.
                    _log.warning("unreadable record left out", generation=generation_id.decode(errors="replace"))
        except sqlite3.Error as error:
            raise _unusable(self._folder / _FILE, error) from None
        return records


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """The operator is told what happened, the caller that something did."""
    try:
        yield
    except sqlite3.Error as error:
        _log.error("the state cannot be accessed", error=str(error))
        raise errors.StateUnavailable(
            "The server cannot access its state at the moment.", retry_after=_RETRY_SECONDS
        ) from None


def _unusable(path: Path, error: OSError | sqlite3.Error) -> errors.StateUnusable:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the primary code; the other bits are details
    if code == sqlite3.SQLITE_BUSY:
        return errors.StateUnusable(f"--state: {path} is in use by another server. Give each a folder of its own.")
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return errors.StateUnusable(
            f"--state: {path} is damaged, or no state of Calotype. Move it away to begin anew, or name another folder."
        )
    return errors.StateUnusable(
        f"--state: {path} cannot be opened ({getattr(error, 'strerror', None) or error})."
        " Name a folder on a disk with space that this user may write to."
    )
