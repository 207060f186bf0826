"""A reader who counts from the moment it is made until it has left, whether or not it ever reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

__all__ = ["Reader"]

T = TypeVar("T")


class Reader(Generic[T]):
    """An async iterator that tells once when it is left: at the end, on an error or a cancellation, or when closed.

    A bare async generator tells nothing when it is dropped before its first item.

    Args:
        items: What is read.
        on_left: Called once.
    """

    def __init__(self, items: AsyncGenerator[T, None], on_left: Callable[[], None]) -> None:
        self._items = items
        self._on_left: Callable[[], None] | None = on_left

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        try:
            return await anext(self._items)
        except BaseException:
            self._leave()
            raise

    async def aclose(self) -> None:
        """Leaves."""
        try:
            await self._items.aclose()
        finally:
            self._leave()

    def _leave(self) -> None:
        if self._on_left is not None:
            on_left, self._on_left = self._on_left, None
            on_left()
