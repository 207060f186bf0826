"""Folds the messages of one stream into its state. No I/O: both kinds of generation are this plus a call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._convert import image_from_proto, phase_from_proto, progress_from_proto
from ._errors import CalotypeError, Cancelled, InternalError, StreamIncomplete
from ._status import from_error_message
from ._types import Notice, Phase, Progress

if TYPE_CHECKING:
    from ._image import Image
    from .v1 import calotype_pb2 as v1

__all__ = ["Assembler", "incomplete"]


def incomplete() -> StreamIncomplete:
    """Makes the error of a call that ended well, and of a generation of which no end was told."""
    return StreamIncomplete("The stream ended without saying how the generation ended.", reason="STREAM_INCOMPLETE")


class Assembler:
    """State of one generation.

    Attributes:
        progress: The newest progress, or None before the first message.
        image: The final image, once it is complete.
        error: Why there will be none, once that is known.
        warnings: Every warning so far, each once.
    """

    def __init__(self) -> None:
        self.progress: Progress | None = None
        self.image: Image | None = None
        self.error: CalotypeError | None = None
        self.warnings: tuple[Notice, ...] = ()
        self._chunks: list[bytes] = []

    @property
    def ended(self) -> bool:
        """Whether it is known how the generation ended."""
        return self.image is not None or self.error is not None

    def feed(self, message: v1.Progress) -> Progress | None:
        """Takes a message.

        Returns:
            What to show for it. None for all but the last chunk of a final image, and for an end without one, unless
            that is the first to say that previews are withdrawn.
        """
        if self.ended:
            return None
        phase = phase_from_proto(message.phase)
        if phase is Phase.SUCCEEDED:
            return self._add_chunk(message)
        known = self.progress is not None and self.progress.previews_withdrawn
        self._note(progress_from_proto(message))
        if phase.ended:
            self.error = from_error_message(message.error, Cancelled if phase is Phase.CANCELLED else InternalError)
            # Messages merge when the reader is slow: this may be the only one that says so.
            return None if known or not message.previews_withdrawn else self.progress
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
        """Notes that the call has broken: an image of which a part is missing comes again from the start."""
        self._chunks.clear()

    def close(self, error: CalotypeError) -> None:
        """Notes that nothing more will come. The end that a message told counts more than the status of the call."""
        if not self.ended:
            self.error = error

    def outcome(self) -> Image:
        """Returns the image of a generation that has ended, or raises its error."""
        if self.error is not None:
            # A copy of the traceback would grow with every call.
            raise self.error.with_traceback(None)
        assert self.image is not None
        return self.image
