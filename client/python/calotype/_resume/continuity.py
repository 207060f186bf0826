"""Joins the messages of several calls to one stream that never repeats or goes back."""

from __future__ import annotations

from ..v1 import calotype_pb2 as v1

__all__ = ["ENDS", "Continuity"]

ENDS = (v1.PHASE_SUCCEEDED, v1.PHASE_FAILED, v1.PHASE_CANCELLED)


class Continuity:
    """Tracks what the caller has seen, to decide whether a message is news.

    The messages of the first call pass unchanged. After a reconnect, the server either continues the same event log
    after `sequence`, or starts a new one; messages of a new log are skipped until they pass what the caller has seen.

    Args:
        generation_id: The generation to watch. None for one that this client starts.
        sequence: The last sequence number that the caller knows.

    Attributes:
        sequence: The last sequence number read of the current event log, for `WatchRequest.after_sequence`.
        shown: The highest numbers that the caller has seen, and flags that stay true. Without images.
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
        """Records that the call is lost."""
        self._was_cut = True
        self._dropped = self.shown.previews_dropped

    def join(self, message: v1.Progress) -> v1.Progress | None:
        """Takes a message, and edits it to continue what the caller has seen.

        Returns:
            The message, or None when it holds no news.
        """
        if message.generation_id != self._log:
            self._log, self._offset, self.sequence = message.generation_id, self.shown.sequence, 0
            self._catching_up = self._was_cut
        if self._was_cut and not self._is_news(message):
            return None
        # The end may be lost before its last chunk. Then the messages before it come again.
        self._catching_up = self._catching_up and message.phase in ENDS
        if self._was_cut:
            self._renumber(message)
        self._note(message)
        return message

    def _is_news(self, message: v1.Progress) -> bool:
        if message.phase in ENDS:
            return True
        if message.sequence <= self.sequence:
            return False
        self.sequence = message.sequence
        if message.image_step <= self.shown.image_step:
            _clear_image(message)
        if not self._catching_up:
            return True
        position, shown = (message.phase, message.step), (self.shown.phase, self.shown.step)
        # The position in the queue changes while phase and step stay the same.
        return position > shown or (position == shown and bool(message.image or message.phase == v1.PHASE_QUEUED))

    def _renumber(self, message: v1.Progress) -> None:
        # After a restart with kept state, the log of the same generation may end with a lower number than was shown.
        least = self.shown.sequence + (self.shown.phase not in ENDS)
        message.sequence = max(message.sequence + self._offset, least)
        message.step = max(message.step, self.shown.step)
        message.previews_dropped += self._dropped
        message.previews_withdrawn |= self.shown.previews_withdrawn

    def _note(self, message: v1.Progress) -> None:
        shown = self.shown
        if message.phase not in ENDS:  # the next call requests an incomplete image again
            self.sequence = max(self.sequence, message.sequence - self._offset)
            shown.image_step = max(shown.image_step, message.image_step)
        shown.sequence, shown.phase, shown.step = message.sequence, message.phase, message.step
        shown.previews_dropped, shown.previews_withdrawn = message.previews_dropped, message.previews_withdrawn


def _clear_image(message: v1.Progress) -> None:
    message.image, message.image_format, message.image_kind = (
        b"",
        v1.IMAGE_FORMAT_UNSPECIFIED,
        v1.IMAGE_KIND_UNSPECIFIED,
    )
    message.image_step = message.width_px = message.height_px = 0
    message.preview_method = v1.PREVIEW_METHOD_UNSPECIFIED
