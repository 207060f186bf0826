"""One caller's view of a generation: its updates, with previews encoded as the caller wants them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import structlog

from calotype_server import errors
from calotype_server.observability.events import PreviewsDropped

if TYPE_CHECKING:
    from calotype_server.generations.event_log import Subscription, Update
    from calotype_server.generations.generation import Generation
    from calotype_server.images.encoder import Encoder
    from calotype_server.types import EncodedImage, PreviewOptions

__all__ = ["Reader"]

_log = structlog.get_logger(__name__)


class Reader:
    """Iterates over the updates of one generation, up to and including its end.

    `Generations.start` and `Generations.follow` open it; it is counted as a reader until their block is left.

    Args:
        generation: The generation to read.
        subscription: A subscription to its event log.
        encoder: Encodes the previews.
        preview: Size and quality of the previews for this reader; None for those of the request.

    Attributes:
        generation: The generation to read.
    """

    def __init__(
        self, generation: Generation, subscription: Subscription, encoder: Encoder, preview: PreviewOptions | None
    ) -> None:
        self.generation = generation
        self._subscription = subscription
        self._encoder = encoder
        self._preview = preview or generation.job.preview
        self._reported_drops = 0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[Update, EncodedImage | None]:
        update = await anext(self._subscription)
        self._report_drops(update)
        if update.preview is None:
            return update, None
        try:
            return update, await self.generation.encoded_preview(self._encoder, update.preview, self._preview)
        except errors.ServiceError as error:
            _log.warning("a preview was left out", error=error.message)
            return update, None
        except Exception:
            # The caller misses one preview, and the stream continues to its end.
            _log.exception("a preview could not be encoded")
            return update, None

    def _report_drops(self, update: Update) -> None:
        """Reports previews that this reader was too slow to read."""
        new = update.previews_dropped - update.state.previews_skipped - self._reported_drops
        if new:
            self._reported_drops += new
            self.generation.observe(PreviewsDropped("unread", new))
