"""Stores every accepted generation and its end on disk, so that they survive a restart. Optional.

When a method returns, its change is durable. `state` has the file.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import shutil
import time
from typing import TYPE_CHECKING, Final, Self, TypeVar

import structlog

from calotype_server import errors
from calotype_server.failpoints import hit
from calotype_server.generations.records import End, ImageFacts, Record
from calotype_server.generations.state.folder import Lock
from calotype_server.generations.state.repair import open_state
from calotype_server.generations.state.seals import Damaged
from calotype_server.generations.state.thread import RETRY_SECONDS, StoreThread, unavailable
from calotype_server.types import Failed, Succeeded

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable
    from pathlib import Path

    from calotype_server.generations.state.file import Row, StateFile
    from calotype_server.types import Job, Notice

__all__ = ["Store"]

_log = structlog.get_logger(__name__)

_TIMEOUT_SECONDS: Final = 10.0
_CLOSE_SECONDS: Final = 3.0

_PROBE_SECONDS: Final = 2.0
"""Interval at which the store checks whether a problem is solved."""

_SPARE_BYTES: Final = 4 * 1024**2
"""Free space for everything except images: the write-ahead log keeps 1000 pages before it is moved into the file."""

_COPIES: Final = 2
"""An image is written to the write-ahead log, and then to the file."""

T = TypeVar("T")


class Store:
    """Stores generations in a folder; create it with `open` or `opened`.

    All methods are for the event loop. A single thread does the work, one call after another. A call that is cancelled
    may or may not take effect.

    Attributes:
        replica: Tag of the server that owns these generations.
    """

    replica: str

    def __init__(self, folder: Path, seconds: float) -> None:
        self._folder = folder.expanduser()
        self._thread = StoreThread(seconds)
        self._closed = False
        self._problem: str | None = None
        self._recovering: asyncio.Task[None] | None = None
        self._damaged: frozenset[str] = frozenset()
        # Everything below belongs to the thread.
        self._lock: Lock
        self._file: StateFile
        self._ordinals: dict[str, int] = {}
        self._reserved: dict[str, int] = {}
        """Free space for the image of each generation that has not ended, in bytes."""
        self._missed = 0
        """Free space that the last rejected generation needed, in bytes: until it exists, the problem is not solved."""

    @classmethod
    async def open(cls, folder: Path, seconds: float = _TIMEOUT_SECONDS) -> Self:
        """Opens the state in `folder`, and creates it if needed. Holds an exclusive lock until `close` or process exit.

        A file with a damaged structure is repaired: a new one takes its place, and it is kept under another name.

        Args:
            folder: Where the state is. Opening a large file, and `load`, may take longer than `seconds`.
            seconds: Time after which every other call fails if the disk does not respond.

        Raises:
            StateUnusable: The state cannot be used; the message says why and what to do.
        """
        store = cls(folder, seconds)
        try:
            await store._thread.run(store._open, patient=True)
        except errors.StateUnavailable:
            store._thread.close()
            raise errors.StateUnusable(f"--state: the file in {folder} cannot be opened; see the log.") from None
        except BaseException:
            # A caller that is cancelled does not wait for a disk that hangs.
            store._thread.close()
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

    @property
    def hangs(self) -> bool:
        """Whether the disk does not respond."""
        return self._thread.hangs

    @property
    def problem(self) -> str | None:
        """Why no new generation can be accepted, in one sentence for operators; None while all is well.

        It is set by a call that hangs or fails to write. The store then checks every 2 s whether the disk works again.
        """
        return "The state folder does not respond." if self.hangs else self._problem

    @property
    def damaged(self) -> frozenset[str]:
        """Ids of the stored generations that cannot be read. Known after `load`."""
        return self._damaged

    async def load(self) -> list[Record]:
        """Returns all generations that can be read, oldest first, without images. A damaged end is a `DataLoss`.

        Raises:
            StateUnusable: The file cannot be read.
        """
        try:
            records, self._damaged = await self._thread.run(self._load, patient=True)
        except errors.StateUnavailable:
            raise errors.StateUnusable(f"--state: the file in {self._folder} cannot be read; see the log.") from None
        return records

    async def accept(self, record: Record) -> None:
        """Stores a new generation.

        Raises:
            StateUnavailable: It could not be written, or the disk has no room for its image.
        """

        def accept() -> bool:
            hit("store.accept")
            needed = _image_bytes(record.job)
            self._require_space(needed)
            self._ordinals[record.generation_id] = self._file.add(record)
            self._reserved[record.generation_id] = needed
            return True

        await self._write(accept)

    async def note_attempts(self, generation_id: str, attempts: int) -> None:
        """Stores how often the engine started to work on a generation. An unknown id is ignored.

        Raises:
            StateUnavailable: It could not be written.
        """

        def write() -> bool:
            hit("store.attempt")
            if ordinal := self._ordinals.get(generation_id):
                self._file.set_attempts(ordinal, generation_id, attempts)
            return ordinal is not None

        await self._write(write)

    async def end(
        self,
        generation_id: str,
        end: Succeeded | Failed,
        *,
        step: int,
        total_steps: int,
        notices: tuple[Notice, ...] = (),
    ) -> None:
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
            notices=notices,
        )

        def write() -> bool:
            hit("store.end")
            if ordinal := self._ordinals.get(generation_id):
                self._file.end(ordinal, generation_id, stored, None if image is None else image.data)
                self._reserved.pop(generation_id, None)
            return ordinal is not None

        await self._write(write)

    async def forget(self, generation_ids: Iterable[str]) -> None:
        """Removes generations; unknown ids are ignored.

        Raises:
            StateUnavailable: It could not be written.
        """
        ids = list(generation_ids)

        def forget() -> bool:
            hit("store.forget")
            known = [each for each in ids if each in self._ordinals]
            self._file.remove(self._ordinals[each] for each in known)
            for each in known:
                del self._ordinals[each]
                self._reserved.pop(each, None)
            return bool(known)

        await self._write(forget)

    async def image(self, generation_id: str) -> bytes | None:
        """Returns the final image, or None if there is none.

        Raises:
            DataLoss: It is damaged.
            StateUnavailable: It could not be read.
        """

        def read() -> bytes | None:
            ordinal = self._ordinals.get(generation_id)
            return None if ordinal is None else self._file.image(ordinal, generation_id)

        return await self._thread.run(lambda: _without_details(read))

    async def probe(self) -> None:
        """Checks whether a new generation could be stored: writes to the disk, and clears `problem` if that succeeds.

        Raises:
            StateUnavailable: It could not be stored.
        """

        def probe() -> None:
            self._require_space(self._missed)
            self._file.probe()
            self._missed = 0

        await self._thread.run(lambda: _without_details(probe, quiet=True))
        self._problem = None

    async def touch(self) -> None:
        """Checks whether the folder accepts changes, so that `problem` is true on an idle server as well.

        It does not wait for the disk, which may sleep: a file system that is frozen or read-only answers for it.

        Raises:
            StateUnavailable: The folder does not accept changes.
        """
        try:
            await self._thread.run(lambda: _without_details(lambda: os.utime(self._folder)))
        except errors.StateUnavailable as error:
            self._note_problem(error.message)
            raise

    async def responsive(self) -> None:
        """Waits until the call that hangs, if there is one, has returned."""
        await self._thread.responsive()

    async def close(self) -> None:
        """Closes the file after pending calls and releases the lock. A second call does nothing.

        If the disk does not respond within a few seconds, the exit of the process closes the file.
        """
        if self._closed:
            return
        self._closed = True
        if self._recovering is not None:
            self._recovering.cancel()
        try:
            await self._thread.run(self._close, seconds=_CLOSE_SECONDS)
        except errors.StateUnavailable:
            _log.error("the state was not closed")
        self._thread.close()

    async def _write(self, change: Callable[[], bool]) -> None:
        """Makes a change, which returns whether anything was written."""
        try:
            written = await self._thread.run(lambda: _without_details(change))
        except errors.StateUnavailable as error:
            self._note_problem(error.message)
            raise
        if written and not self._missed:
            self._problem = None

    def _note_problem(self, problem: str) -> None:
        if self._problem is None:
            _log.error("new generations are rejected until the state can be written", problem=problem)
        self._problem = problem
        if not self._closed and (self._recovering is None or self._recovering.done()):
            self._recovering = asyncio.create_task(self._recover())

    async def _recover(self) -> None:
        """Checks regularly whether the problem is solved: while it is not, there may be no other write."""
        while self._problem is not None:
            await asyncio.sleep(_PROBE_SECONDS)
            with contextlib.suppress(errors.StateUnavailable):
                await self.probe()
        _log.info("the state can be written again")

    def _open(self) -> None:
        self._lock = Lock(self._folder)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._lock.close)
            self._file = open_state(self._lock.path)
            on_failure.callback(self._file.close)
            self._ordinals = _without_details(self._file.ordinals)
            on_failure.pop_all()
        self.replica = self._file.replica

    def _close(self) -> None:
        try:
            self._file.close()
        finally:
            self._lock.close()

    def _load(self) -> tuple[list[Record], frozenset[str]]:
        def read() -> list[Row]:
            hit("store.load")
            return list(self._file.rows())

        records: list[Record] = []
        damaged: set[str] = set()
        for row in _without_details(read):
            if row.damage:
                # Without its content, which would quote the prompt.
                _log.error("a stored generation is damaged", generation=row.generation_id, parts=list(row.damage))
            if row.record is None:
                damaged.add(row.generation_id)
                continue
            self._ordinals[row.generation_id] = row.ordinal
            if row.record.end is None:
                self._reserved[row.generation_id] = _image_bytes(row.record.job)
            records.append(row.record)
        return records, frozenset(damaged)

    def _require_space(self, size: int) -> None:
        needed = _COPIES * (size + sum(self._reserved.values())) + _SPARE_BYTES
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            if not self._missed:
                _log.error("the disk of the state is almost full", free_bytes=free, needed_bytes=needed)
            self._missed = size
            raise errors.StateUnavailable("The server's disk has no room for another image.", retry_after=RETRY_SECONDS)


def _image_bytes(job: Job) -> int:
    """Returns a bound for the size of the final image: formats that compress never add more than this."""
    return 3 * math.prod(job.output_size) + 64 * 1024


def _without_details(work: Callable[[], T], *, quiet: bool = False) -> T:
    """Returns the result of `work`. Logs an error for the operator, and raises one without details for the caller."""
    try:
        return work()
    except errors.ServiceError:
        raise
    except Damaged:
        raise errors.DataLoss("The stored image is damaged.") from None
    except Exception as error:
        if not quiet:
            _log.error("cannot access the state", error=str(error), kind=type(error).__name__)
        raise unavailable() from None
