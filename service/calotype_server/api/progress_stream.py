"""A stream of `Progress` messages for one reader of one generation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from calotype_server.api.encoding import encode_update
from calotype_server.types import Failed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from calotype.v1 import calotype_pb2 as pb
    from calotype_server.errors import ServiceError
    from calotype_server.generations.generation import Generation
    from calotype_server.generations.reader import Reader

__all__ = ["ProgressStream"]


class ProgressStream:
    """Iterates over the messages of a generation, up to and including its end.

    Args:
        reader: Reads the generation.
        whole: Whether the final image is sent in one message, regardless of its size. Otherwise it is sent in chunks.
    """

    def __init__(self, reader: Reader, *, whole: bool) -> None:
        self._reader = reader
        self._whole = whole
        self._messages: Iterator[pb.Progress] = iter(())
        self._first: pb.Progress | None = None

    @property
    def generation(self) -> Generation:
        """The generation of the stream."""
        return self._reader.generation

    @property
    def failure(self) -> ServiceError | None:
        """The error that the generation ended with, or None."""
        end = self.generation.events.state.end
        return end.error if isinstance(end, Failed) else None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> pb.Progress:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        while (message := next(self._messages, None)) is None:
            update, image = await anext(self._reader)
            generation = self.generation
            self._messages = encode_update(generation.id, generation.job.seed, update, image, whole=self._whole)
        return message

    async def prefetch(self) -> None:
        """Reads the first message now, so that it describes this moment no matter when it is sent."""
        self._first = await anext(self)
