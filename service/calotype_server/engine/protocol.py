"""The interface between the server and an engine. Heavy code depends on this module, never the other way round."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from calotype_server.types import Event, Job, ModelInfo, Pixels

__all__ = ["Engine", "Stop"]


class Stop:
    """Asks a run to end. Safe to use from any thread; it cannot be undone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []
        self._set = False
        self._finishing = False

    @property
    def finishing(self) -> bool:
        """Whether the run should end with the predicted image of the current step."""
        return self._finishing

    def finish(self) -> None:
        """Asks the run to end early with the image as it is."""
        self._finishing = True

    def set(self) -> None:
        """Asks the run to end without an image, and calls the callbacks."""
        with self._lock:
            self._set = True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def is_set(self) -> bool:
        """Whether the run should end without an image."""
        return self._set

    def call(self, callback: Callable[[], None]) -> None:
        """Registers a function for `set` to call, or calls it now if that has happened. It must not block or raise."""
        with self._lock:
            if not self._set:
                self._callbacks.append(callback)
                return
        callback()


class Engine(Protocol):
    """One loaded model on one device."""

    @property
    def model(self) -> ModelInfo:
        """Capabilities and defaults of the model."""
        ...

    def run(self, job: Job, report: Callable[[Event], None], stop: Stop) -> Pixels:
        """Generates one image. Blocks the calling thread until the device no longer works on it.

        Args:
            job: What to generate.
            report: Receives `EncodingPrompt`, `Denoising`, `PreviewReady` and `Decoding` as they happen. A second
                `Decoding` can correct the time of the first. This thread and others call it, and it must not block.
            stop: If set, the run ends before the next denoising step; a wait for the device ends at once. If
                `finishing`, the predicted image of the current step is decoded and returned.

        Raises:
            Cancelled: `stop` was set.
            GenerationError: The generation failed; `EngineDead` if no further call can succeed.
        """
        ...

    def close(self) -> None:
        """Ends the engine's threads. No `run` may be active."""
        ...

    def note_preview_encoding(self, seconds: float) -> None:
        """Charges the preview budget with processor time that encoding a preview took, in seconds. Thread-safe."""
        ...
