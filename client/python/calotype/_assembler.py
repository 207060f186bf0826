"""Assembles the messages of a generation to its state: newest progress, warnings, image or error. Does no I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._convert import image_from_proto, phase_from_proto, progress_from_proto
from ._errors import CalotypeError, Cancelled, InternalError, StreamIncomplete
from ._status import from_error_message
from ._types import Notice, Phase, Progress

if TYPE_CHECKING:
    from ._image import Image
    from .v1 import calotype_pb2 as v1

__all__ = ["Assembler"]


class Assembler:
    """State of one generation.

    Attributes:
        progress: The newest progress, or None before the first message.
        image: The final image, once it is complete.
        error: Why there is no final image, once that is known.
        warnings: All distinct warnings so far, in order of arrival.
    """

    def __init__(self) -> None:
        self.progress: Progress | None = None
        self.image: Image | None = None
        self.error: CalotypeError | None = None
        self.warnings: tuple[Notice, ...] = ()
        self._chunks: list[bytes] = []

    @property
    def ended(self) -> bool:
        """Whether the image or the error is known."""
        return self.image is not None or self.error is not None

    def feed(self, message: v1.Progress) -> Progress | None:
        """Takes a message.

        Returns:
            The progress to show, or None. Every message has one, except chunks of a final image before the last, and
            an end without an image, unless it is the first message that withdraws previews.
        """
        if self.ended:
            return None
        phase = phase_from_proto(message.phase)
        if phase is Phase.SUCCEEDED:
            return self._add_chunk(message)
        was_withdrawn = self.progress is not None and self.progress.previews_withdrawn
        self._note(progress_from_proto(message))
        if phase.ended:
            self.error = from_error_message(message.error, Cancelled if phase is Phase.CANCELLED else InternalError)
            # The server merges messages when the reader is slow, so this may be the only one that withdraws previews.
            return None if was_withdrawn or not message.previews_withdrawn else self.progress
        return self.progress

    def _note(self, progress: Progress) -> None:
        self.progress = progress
        self.warnings = tuple(dict.fromkeys(self.warnings + progress.warnings))

    def _add_chunk(self, message: v1.Progress) -> Progress | None:
        if message.chunk_index != len(self._chunks) or not message.image:
            self.error = StreamIncomplete("A part of the final image is missing.", reason="STREAM_INCOMPLETE")
            return None
        self._chunks.append(message.image)
        if len(self._chunks) < message.chunk_count:
            return None
        self._note(progress_from_proto(message))
        self.image = image_from_proto(message, b"".join(self._chunks))
        self._chunks.clear()
        return self.progress

    def interrupt(self) -> None:
        """Records that the call is lost. The next call sends an incomplete image again from its first chunk."""
        self._chunks.clear()

    def close(self, error: CalotypeError) -> None:
        """Records that no more messages arrive. An end that has arrived as a message takes precedence."""
        if not self.ended:
            self.error = error

    def outcome(self) -> Image:
        """Returns the image of a generation that has ended.

        Raises:
            CalotypeError: The generation ended without an image.
        """
        if self.error is not None:
            # The same exception is raised by every call; without this, its traceback would grow.
            raise self.error.with_traceback(None)
        assert self.image is not None
        return self.image
