"""The part of a generation that needs no I/O. Shared by both clients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._assembler import Assembler
from ._errors import CalotypeError, GenerationConsumed

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._resume.policy import Resumption
    from ._types import Notice, Progress
    from .v1 import calotype_pb2 as v1

__all__ = ["BaseGeneration"]


class BaseGeneration:
    """State of a generation, updated when a message arrives or the connection is lost."""

    def __init__(self, resumption: Resumption, on_reconnect: Callable[[CalotypeError, float], None] | None) -> None:
        self._resumption = resumption
        self._on_reconnect = [] if on_reconnect is None else [on_reconnect]
        self._assembler = Assembler()
        self._iterated = False

    @property
    def progress(self) -> Progress | None:
        """The newest progress, or None before the first message."""
        return self._assembler.progress

    @property
    def id(self) -> str | None:
        """Id of the generation, for `Client.watch`, `cancel` and `finish`. None before the first message."""
        return self.progress.generation_id if self.progress else None

    @property
    def seed(self) -> int | None:
        """Seed in use: the requested seed, or the one that the server drew. None before the first message."""
        return self.progress.seed if self.progress else None

    @property
    def warnings(self) -> tuple[Notice, ...]:
        """All distinct warnings so far, such as that the prompt was truncated, in order of arrival."""
        return self._assembler.warnings

    @property
    def done(self) -> bool:
        """Whether the generation has ended: with an image, with an error, or because this client left it."""
        return self._assembler.ended

    def on_reconnect(self, listener: Callable[[CalotypeError, float], None]) -> None:
        """Adds a function for this generation that is called like the client's `on_reconnect`."""
        self._on_reconnect.append(listener)

    def _take(self, message: v1.Progress) -> Progress | None:
        """Takes a message. Returns the progress to show, or None when the caller has seen it before."""
        news = self._resumption.take(message)
        return None if news is None else self._assembler.feed(news)

    def _lost(self, error: CalotypeError) -> float | None:
        """Takes the error that ended a call. Returns seconds to wait before the next call, or None for no next call."""
        if self._assembler.ended:
            return None
        verdict = self._resumption.lost(error)
        if isinstance(verdict, CalotypeError):
            self._assembler.close(verdict)
            return None
        self._assembler.interrupt()
        if (loss := self._resumption.last_loss) is not None:
            for listener in self._on_reconnect:
                listener(loss, verdict)
        return verdict

    def _start_iterating(self) -> None:
        if self._iterated:
            raise GenerationConsumed
        self._iterated = True

    def __repr__(self) -> str:
        at = f"{self.progress.phase} {self.progress.step}/{self.progress.total_steps}" if self.progress else "started"
        return f"<{type(self).__name__} {self.id or '?'}: {at}>"
