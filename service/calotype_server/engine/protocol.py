"""The interface between the server and an engine. It imports nothing heavy."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from calotype_server.types import Event, Job, ModelInfo, Pixels

__all__ = ["Engine", "Stop"]


class Stop:
    """Tells a run to stop or to finish early. Thread-safe; a stop cannot be taken back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []
        self._set = False
        self.finishing = False
        """Whether the run should end successfully after the current step, with its prediction as the image."""

    def finish(self) -> None:
        """Requests an early finish."""
        self.finishing = True

    def set(self) -> None:
        """Requests a stop, and calls the callbacks."""
        with self._lock:
            self._set = True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def is_set(self) -> bool:
        """Whether a stop was requested."""
        return self._set

    def call(self, callback: Callable[[], None]) -> None:
        """Registers a callback for a stop, or calls it at once after a stop. It must not block or raise."""
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
            job: The image to generate.
            report: Called with `EncodingPrompt`, `Denoising`, `PreviewReady` and `Decoding` as they happen, from this
                and other threads. Does not block.
            stop: When set, the run ends before the next denoising step, and a wait for the device ends at once. When
                `finishing`, the prediction of the current step is decoded and returned.

        Raises:
            Cancelled: `stop` was set.
            GenerationError: Any other failure; `EngineDead` when no further call can succeed.
        """
        ...

    def close(self) -> None:
        """Ends the engine's threads. All runs must have ended."""
        ...

    def note_preview_encoding(self, seconds: float) -> None:
        """Charges the preview budget with processor time that encoding a preview took, in seconds. Thread-safe."""
        ...
