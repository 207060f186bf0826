"""Merges several iterators, as tasks. `threads.merging` does so with threads."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence

__all__ = ["merge"]

T = TypeVar("T")


async def merge(sources: Sequence[AsyncIterator[T]], leave: Callable[[], None]) -> AsyncGenerator[tuple[int, T]]:
    """Yields the items of all sources as they arrive, with the index of the source.

    A source is read again when its last item has been taken, so a slow caller holds at most one item of each.

    Args:
        sources: Iterators, each of which may wait.
        leave: Called first when the loop ends or is left.

    Raises:
        Exception: The first one that a source raises.
    """
    pending = {_next(source): index for index, source in enumerate(sources)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=pending.__getitem__):
                index = pending.pop(task)
                try:
                    item = task.result()
                except StopAsyncIteration:
                    continue
                yield index, item
                pending[_next(sources[index])] = index
    finally:
        leave()
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


def _next(source: AsyncIterator[T]) -> asyncio.Task[T]:
    async def read() -> T:
        return await anext(source)

    return asyncio.create_task(read())
