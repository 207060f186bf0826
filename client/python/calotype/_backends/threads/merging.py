"""Merges several iterators, with a thread for each. `aio.merging` does the same with asyncio."""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

__all__ = ["merge"]

T = TypeVar("T")


def merge(sources: Sequence[Iterator[T]], leave: Callable[[], None]) -> Generator[tuple[int, T]]:
    """Yields the items of all sources as they arrive, with the index of the source.

    A source is read again when its last item has been taken, so a slow caller holds at most one item of each.

    Args:
        sources: Iterators, each of which may wait.
        leave: Called first when the loop ends or is left. Must end the waits of all sources.

    Raises:
        Exception: The first one that a source raises.
    """
    readers = [_Reader(source) for source in sources]
    arrived: SimpleQueue[int] = SimpleQueue()
    try:
        for index, reader in enumerate(readers):
            reader.start(index, arrived)
        ended = 0
        while ended < len(readers):
            index = arrived.get()
            try:
                item = readers[index].take()
            except StopIteration:
                ended += 1
                continue
            yield index, item
            readers[index].resume()
    finally:
        leave()
        for reader in readers:
            reader.stop()


class _Reader:
    """Reads a source in a thread: one item, and the next one after `resume`."""

    def __init__(self, source: Iterator[Any]) -> None:
        self._source = source
        self._wanted = threading.Semaphore()
        self._stopped = False
        self._item: Any = None
        self._error: BaseException | None = None

    def start(self, index: int, arrived: SimpleQueue[int]) -> None:
        """Starts to read. Puts `index` into the queue after each item, and after the error that ends the source."""

        def read() -> None:
            while self._error is None:
                self._wanted.acquire()
                if self._stopped:
                    return
                try:
                    self._item = next(self._source)
                except BaseException as error:
                    self._error = error
                arrived.put(index)

        threading.Thread(target=read, name=f"calotype-member-{index}", daemon=True).start()

    def take(self) -> Any:
        """Returns the item that has arrived.

        Raises:
            StopIteration: The source has ended.
            BaseException: The source raised it.
        """
        if self._error is not None:
            raise self._error
        return self._item

    def resume(self) -> None:
        """Reads the next item."""
        self._wanted.release()

    def stop(self) -> None:
        """Ends the thread when its current read ends."""
        self._stopped = True
        self._wanted.release()
