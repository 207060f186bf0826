"""Several generations of one prompt: follow them together, wait for their images, cancel all of them."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Self

from .._backends.aio.merging import merge
from .._errors import CalotypeError, Cancelled, GenerationConsumed
from .._types import MemberProgress

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from types import TracebackType

    from .._image import Image
    from .._types import Progress
    from .calls import AsyncCalls
    from .generation import AsyncGeneration

__all__ = ["AsyncGenerationGroup"]


class AsyncGenerationGroup:
    """Several generations on the server. Made by `AsyncClient.generate_many`.

    Usage::

        async with client.generate_many("a red apple", 4, seed=1) as group:
            async for index, progress in group:
                print(index, progress.phase, progress.step, progress.preview)
            images = await group.images()

    Iterate over it once to receive the progress of all members as it arrives, each with the index of its member, or
    iterate over a member of `generations`. Each member reconnects as described at `AsyncClient`. The functions
    `on_reconnect` may be called by several threads of the sync client.

    Members are independent: when one fails, the others continue. The loop ends when all members have ended, and does
    not raise their errors: `images` and `outcomes` report them.

    Leaving the loop early, or the `async with` block, cancels all members that have not ended with one call, unless
    they were started with `on_disconnect="keep"`.

    Attributes:
        id: Id of the group, for `AsyncClient.cancel`.
        generations: The members, in the order of their seeds.
    """

    def __init__(self, calls: AsyncCalls, group: str, generations: Sequence[AsyncGeneration]) -> None:
        self.id = group
        self.generations = tuple(generations)
        self._calls = calls
        self._iterated = False

    @property
    def done(self) -> bool:
        """Whether all members have ended."""
        return all(generation.done for generation in self.generations)

    def on_reconnect(self, listener: Callable[[CalotypeError, float], None]) -> None:
        """Adds a function that is called like the client's `on_reconnect`, for each member."""
        for generation in self.generations:
            generation.on_reconnect(listener)

    async def __aiter__(self) -> AsyncIterator[MemberProgress]:
        if self._iterated:
            raise GenerationConsumed
        self._iterated = True
        async with aclosing(merge([_progress(each) for each in self.generations], self._leave)) as merged:
            async for index, progress in merged:
                yield MemberProgress(index, progress)

    async def images(self) -> list[Image]:
        """Waits for the end of all members and returns their images, in the order of `generations`.

        Can be called again, and inside the loop. An exception that ends the wait early cancels all members.

        Raises:
            CalotypeError: The error of the first member that has no image. `outcomes` returns the images of the others.
        """
        outcomes = await self.outcomes()
        images = [outcome for outcome in outcomes if not isinstance(outcome, CalotypeError)]
        if len(images) < len(outcomes):
            raise next(outcome for outcome in outcomes if isinstance(outcome, CalotypeError)).with_traceback(None)
        return images

    async def outcomes(self) -> list[Image | CalotypeError]:
        """Waits for the end of all members and returns the image or the error of each, in the order of `generations`.

        Can be called again, and inside the loop. An exception that ends the wait early cancels all members.
        """
        found: dict[int, Image | CalotypeError] = {}
        async with aclosing(merge([_outcome(each) for each in self.generations], self._leave)) as merged:
            async for index, outcome in merged:
                found[index] = outcome
        return [found[index] for index in range(len(self.generations))]

    def cancel(self) -> None:
        """Cancels all members on the server with one call, also if they are kept. Does nothing after their end.

        Returns without waiting. `images` then raises `Cancelled`.
        """
        self._leave(Cancelled("Cancelled by this client."), cancel=True)

    def _leave(self, reason: CalotypeError | None = None, *, cancel: bool = False) -> None:
        """Closes the calls of all members, and cancels the group where this alone keeps them running. Never waits."""
        continuing = [generation for generation in self.generations if generation._close(reason, cancel=cancel)]
        if continuing:
            self._calls.send_cancel_group(self.id)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()

    def __len__(self) -> int:
        return len(self.generations)

    def __repr__(self) -> str:
        ended = sum(generation.done for generation in self.generations)
        return f"<{type(self).__name__} {self.id}: {ended} of {len(self)} ended>"


async def _progress(generation: AsyncGeneration) -> AsyncIterator[Progress]:
    try:
        async for progress in generation:
            yield progress
    except CalotypeError:
        pass  # `images` and `outcomes` report it


async def _outcome(generation: AsyncGeneration) -> AsyncIterator[Image | CalotypeError]:
    try:
        yield await generation.result()
    except CalotypeError as error:
        yield error
