"""Joins the messages of several calls to one stream, in which nothing is shown twice and nothing goes back."""

from __future__ import annotations

from ..v1 import calotype_pb2 as v1

__all__ = ["ENDS", "Continuity"]

ENDS = (v1.PHASE_SUCCEEDED, v1.PHASE_FAILED, v1.PHASE_CANCELLED)


class Continuity:
    """What the caller was shown, and what of the next message is news.

    The messages of the first call pass as they are. After a cut, the log on the server may be the same, which goes on
    after `sequence`, or another that begins anew, of which everything is passed over until it is further than what was
    shown.

    Attributes:
        sequence: The last one read of the log on the server, for `WatchRequest.after_sequence`.
        shown: The sum of what was shown: highest numbers, and what once true stays true. Without pictures.
    """

    def __init__(self, generation_id: str | None = None, sequence: int = 0) -> None:
        self.sequence = sequence
        self.shown = v1.Progress(sequence=sequence)
        self._log = generation_id
        self._offset = 0
        self._dropped = 0
        self._was_cut = False
        self._catching_up = False

    def cut(self) -> None:
        """Notes that the call has broken."""
        self._was_cut = True
        self._dropped = self.shown.previews_dropped

    def join(self, message: v1.Progress) -> v1.Progress | None:
        """Takes a message, and edits it so that it goes on from what was shown.

        Returns:
            The message, or None when there is nothing new in it.
        """
        if message.generation_id != self._log:
            self._log, self._offset, self.sequence = message.generation_id, self.shown.sequence, 0
            self._catching_up = self._was_cut
        if self._was_cut and not self._is_news(message):
            return None
        self._catching_up = False
        if self._was_cut:
            self._continue(message)
        self._note(message)
        return message

    def _is_news(self, message: v1.Progress) -> bool:
        if message.phase in ENDS:
            return True
        if message.sequence <= self.sequence:
            return False
        self.sequence = message.sequence
        if message.image_step <= self.shown.image_step:
            _clear_picture(message)
        if not self._catching_up:
            return True
        position, shown = (message.phase, message.step), (self.shown.phase, self.shown.step)
        # Places in the queue change while step and phase do not.
        return position > shown or (position == shown and bool(message.image or message.phase == v1.PHASE_QUEUED))

    def _continue(self, message: v1.Progress) -> None:
        # Another log under the same id, as after a restart with kept state, may end with a lower number than was shown.
        least = self.shown.sequence + (self.shown.phase not in ENDS)
        message.sequence = max(message.sequence + self._offset, least)
        message.step = max(message.step, self.shown.step)
        message.previews_dropped += self._dropped
        message.previews_withdrawn |= self.shown.previews_withdrawn

    def _note(self, message: v1.Progress) -> None:
        shown = self.shown
        if message.phase not in ENDS:  # an image of which a part is missing is asked for again
            self.sequence = max(self.sequence, message.sequence - self._offset)
            shown.image_step = max(shown.image_step, message.image_step)
        shown.sequence, shown.phase, shown.step = message.sequence, message.phase, message.step
        shown.previews_dropped, shown.previews_withdrawn = message.previews_dropped, message.previews_withdrawn


def _clear_picture(message: v1.Progress) -> None:
    message.image, message.image_format, message.image_kind = (
        b"",
        v1.IMAGE_FORMAT_UNSPECIFIED,
        v1.IMAGE_KIND_UNSPECIFIED,
    )
    message.image_step = message.width_px = message.height_px = 0
    message.preview_method = v1.PREVIEW_METHOD_UNSPECIFIED
