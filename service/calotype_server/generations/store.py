"""Stores every accepted generation and its end in one SQLite file, so that they survive a restart. Optional.

When a method returns, its change is durable: each change is one transaction, in a write-ahead log that is synced with
each commit (`synchronous=FULL`).
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self, TypeVar

import structlog

from calotype_server import errors, threads
from calotype_server.failpoints import hit
from calotype_server.generations.ids import new_tag
from calotype_server.generations.records import End, ImageFacts, Record, dump_end, dump_record, parse
from calotype_server.types import Failed, Succeeded

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator
    from concurrent.futures import Future
    from pathlib import Path

__all__ = ["Store"]

_log = structlog.get_logger(__name__)

_FILE = "calotype.sqlite3"

_VERSION = 1
"""Version of the tables and of the meaning of the documents. Adding a field to a document does not change it."""

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
"""Has one row: a restarted server keeps the tag that begins the ids of its generations."""

_RETRY_SECONDS = 5.0
_TIMEOUT_SECONDS = 10.0
_CLOSE_SECONDS = 3.0

T = TypeVar("T")


class Store:
    """Stores generations in a folder; create it with `open` or `opened`.

    All methods are for the event loop. A single thread does the work, one call after another. A call that is cancelled
    may or may not take effect.

    Attributes:
        replica: Tag of the server that owns these generations.
    """

    replica: str

    def __init__(self, folder: Path) -> None:
        self._folder = folder.expanduser()
        self._seconds = _TIMEOUT_SECONDS
        self._hanging: Future[Any] | None = None
        self._writable = True
        self._thread = ThreadPoolExecutor(1, "calotype-store")
        self._closed = False
        self._database: sqlite3.Connection

    @classmethod
    async def open(cls, folder: Path, seconds: float = _TIMEOUT_SECONDS) -> Self:
        """Opens the state in `folder`, and creates it if needed. Holds an exclusive lock until `close` or process exit.

        Args:
            folder: Where the state is. Opening a large file, and `load`, may take longer than `seconds`.
            seconds: Time after which every other call fails if the disk does not respond.

        Raises:
            StateUnusable: The state cannot be used; the message says why and what to do.
        """
        store = cls(folder)
        store._seconds = seconds
        try:
            await store._run(store._open, patient=True)
        except BaseException:
            # A caller that is cancelled does not wait for a disk that hangs.
            store._thread.shutdown(wait=False)
            raise
        return store

    @classmethod
    @contextlib.asynccontextmanager
    async def opened(cls, folder: Path | None, seconds: float = _TIMEOUT_SECONDS) -> AsyncIterator[Self | None]:
        """Opens the state in `folder` for the duration of the block, as `open`; yields None without a folder.

        Raises:
            StateUnusable: As for `open`.
        """
        if folder is None:
            yield None
            return
        store = await cls.open(folder, seconds)
        try:
            yield store
        finally:
            await store.close()

    async def accept(self, record: Record) -> None:
        """Stores a new generation.

        Raises:
            StateUnavailable: It could not be written.
        """
        await self._write(
            "INSERT INTO generations (generation_id, record) VALUES (?, ?)",
            lambda: [(record.generation_id, dump_record(record))],
        )

    async def end(self, generation_id: str, end: Succeeded | Failed, *, step: int, total_steps: int) -> None:
        """Stores how a generation ended, with its image. The first end counts; an unknown id is ignored.

        Raises:
            StateUnavailable: It could not be written.
        """
        image = end.image if isinstance(end, Succeeded) else None
        stored = End(
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
            lambda: [(dump_end(stored), image and image.data, generation_id)],
        )

    async def forget(self, generation_ids: Iterable[str]) -> None:
        """Removes generations; unknown ids are ignored.

        Raises:
            StateUnavailable: It could not be written.
        """
        ids = [(each,) for each in generation_ids]
        await self._write("DELETE FROM generations WHERE generation_id = ?", lambda: ids)

    async def load(self) -> list[Record]:
        """Returns all records, oldest first, without images. Unreadable records are logged and left out.

        Raises:
            StateUnusable: The file is damaged.
        """
        return await self._run(self._load, patient=True)

    async def image(self, generation_id: str) -> bytes | None:
        """Returns the final image, or None if there is none.

        Raises:
            StateUnavailable: It could not be read.
        """

        def read() -> bytes | None:
            query = "SELECT image FROM generations WHERE generation_id = ?"
            with _database_errors():
                found: tuple[bytes | None] | None = self._database.execute(query, (generation_id,)).fetchone()
            return None if found is None else found[0]

        return await self._run(read)

    async def close(self) -> None:
        """Closes the file after pending calls and releases the lock. A second call does nothing.

        If the disk does not respond within a few seconds, the exit of the process closes the file.
        """
        if self._closed:
            return
        self._closed = True
        try:
            await self._run(self._database.close, seconds=min(self._seconds, _CLOSE_SECONDS))
        except errors.StateUnavailable:
            _log.error("the state was not closed")
        self._thread.shutdown(wait=False)

    @property
    def problem(self) -> str | None:
        """Why nothing can be stored now, for health checks and the log; None if there is no problem."""
        if self._hangs:
            return "the state folder does not respond"
        return None if self._writable else "the state folder cannot be written"

    async def probe(self) -> None:
        """Checks whether the folder accepts changes, so that `problem` is true on an idle server as well.

        It does not wait for the disk, which may sleep: a file system that is frozen or read-only answers for it.

        Raises:
            StateUnavailable: It does not.
        """

        def touch() -> None:
            try:
                os.utime(self._folder)
            except OSError as error:
                raise _unavailable() from error

        try:
            await self._run(touch)
        except errors.StateUnavailable:
            if not self._hangs:
                self._writable = False
            raise
        self._writable = True

    async def responsive(self) -> None:
        """Waits until the call that hangs, if there is one, has returned."""
        if self._hanging is not None:
            await threads.completes(self._hanging, None)

    @property
    def _hangs(self) -> bool:
        return self._hanging is not None and not self._hanging.done()

    async def _run(self, function: Callable[[], T], *, patient: bool = False, seconds: float | None = None) -> T:
        """Runs a function in the store's thread.

        A call that does not return in time keeps the thread. Later calls then fail at once, until it returns.

        Args:
            function: Called in the thread.
            patient: Whether the call may take any time.
            seconds: Longest duration, including the calls before it; None for that of the store.

        Raises:
            StateUnavailable: The disk does not respond.
        """
        if self._hangs:
            raise _unavailable()
        work = threads.submit(self._thread, _call, function)
        if not await threads.completes(work, None if patient else seconds or self._seconds):
            # A call that waits behind another one is taken back.
            if not work.cancel():
                self._hanging = work
                work.add_done_callback(lambda _: _log.warning("the state folder responds again"))
                _log.error("the state folder does not respond", stacks=threads.stacks())
            raise _unavailable()
        try:
            return work.result()
        except threads.ThreadFailed as error:
            _log.exception("a call of the state failed")
            raise _unavailable() from error

    async def _write(self, statement: str, rows: Callable[[], list[tuple[Any, ...]]]) -> None:
        def write() -> None:
            with _database_errors(), self._database:
                self._database.executemany(statement, rows())

        await self._run(write)

    def _open(self) -> None:
        path = self._folder / _FILE
        try:
            # Only the owner may read prompts and images.
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.touch(mode=0o600)
            self._database = sqlite3.connect(path, timeout=0)
            # Bytes, so that text that is not UTF-8 damages only one record.
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
        # Before the first access, so that the lock is held until the connection is closed or the process exits.
        self._database.execute("PRAGMA locking_mode = EXCLUSIVE")
        (version,) = self._database.execute("PRAGMA user_version").fetchone()
        if version > _VERSION:
            raise errors.StateUnusable(
                f"--state: {path} was written by a newer Calotype. Update this server, or choose another folder."
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
                    # Without the reason, which would quote the prompt.
                    _log.warning("unreadable record ignored", generation=generation_id.decode(errors="replace"))
        except sqlite3.Error as error:
            raise _unusable(self._folder / _FILE, error) from None
        return records


@contextlib.contextmanager
def _database_errors() -> Iterator[None]:
    """Logs a database error for the operator, and raises one without details for the caller."""
    try:
        yield
    except sqlite3.Error as error:
        _log.error("cannot access the state", error=str(error))
        raise _unavailable() from None


def _call(function: Callable[[], T]) -> T:
    hit("store.call")
    return function()


def _unavailable() -> errors.StateUnavailable:
    return errors.StateUnavailable("The server cannot access its state right now.", retry_after=_RETRY_SECONDS)


def _unusable(path: Path, error: OSError | sqlite3.Error) -> errors.StateUnusable:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the primary code; the other bits are details
    if code == sqlite3.SQLITE_BUSY:
        return errors.StateUnusable(f"--state: {path} is in use by another server. Each server needs its own folder.")
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return errors.StateUnusable(
            f"--state: {path} is damaged or was not written by Calotype. Move it away, or choose another folder."
        )
    return errors.StateUnusable(
        f"--state: {path} cannot be opened ({getattr(error, 'strerror', None) or error})."
        " Choose a folder that this user may write to, on a disk with free space."
    )
