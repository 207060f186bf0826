"""What the server asks of an engine. Everything heavy depends on this, never the reverse."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from calotype_server.types import Event, Job, ModelInfo, Pixels

__all__ = ["Engine"]


class Engine(Protocol):
    """One loaded model on one device."""

    @property
    def model(self) -> ModelInfo:
        """What the model can do and does by default."""
        ...

    def run(self, job: Job, report: Callable[[Event], None], stop: threading.Event) -> Pixels:
        """Generates one picture; blocks the calling thread until the device is free of it.

        Args:
            job: What to generate.
            report: Takes `EncodingPrompt`, `Denoising`, `PreviewReady` and `Decoding` as they happen; called from this
                and other threads, and it must not block.
            stop: When set, the work ends before the next denoising step.

        Raises:
            Cancelled: `stop` was set.
            GenerationError: Any other way to fail; `EngineDead` when no further call can succeed.
        """
        ...

    def close(self) -> None:
        """Frees threads; no `run` may be under way."""
        ...
