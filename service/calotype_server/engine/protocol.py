"""What the server asks of an engine. Everything heavy depends on this, never the reverse."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from calotype_server.types import Event, Job, ModelInfo, Pixels

__all__ = ["Engine", "Stop"]


class Stop:
    """Asks a run to end. From any thread, and once for all."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []
        self._set = False
        self.finishing = False
        """Whether the run shall end with the picture as it is after the step under way."""

    def finish(self) -> None:
        """Asks for the picture as it is."""
        self.finishing = True

    def set(self) -> None:
        """Asks."""
        with self._lock:
            self._set = True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def is_set(self) -> bool:
        """Whether the run shall end."""
        return self._set

    def call(self, callback: Callable[[], None]) -> None:
        """Has `callback` called when the run shall end: at once if that is so already. It must not block or raise."""
        with self._lock:
            if not self._set:
                self._callbacks.append(callback)
                return
        callback()


class Engine(Protocol):
    """One loaded model on one device."""

    @property
    def model(self) -> ModelInfo:
        """What the model can do and does by default."""
        ...

    def run(self, job: Job, report: Callable[[Event], None], stop: Stop) -> Pixels:
        """Generates one picture; blocks the calling thread until the device is free of it.

        Args:
            job: What to generate.
            report: Takes `EncodingPrompt`, `Denoising`, `PreviewReady` and `Decoding` as they happen; called from this
                and other threads, and it must not block.
            stop: When set, the work ends before the next denoising step; a wait for the device ends at once. When it is
                `finishing`, the predicted picture of the step under way is decoded and returned.

        Raises:
            Cancelled: `stop` was set.
            GenerationError: Any other way to fail; `EngineDead` when no further call can succeed.
        """
        ...

    def close(self) -> None:
        """Frees threads; no `run` may be under way."""
        ...
