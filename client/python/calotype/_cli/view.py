"""The interface of views of a generation, and text for its progress."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from .._errors import CalotypeError
    from .._image import Image
    from .._types import Progress

__all__ = ["RECONNECTING", "BaseView", "View", "describe", "summarize"]

RECONNECTING = "connection lost, reconnecting ..."


class View(Protocol):
    """Shows one generation, or several: `index` is then the index of one of them, from 0."""

    def __enter__(self) -> View: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def update(self, progress: Progress, path: Path | None, index: int = 0) -> None:
        """Shows progress. `path` is the file of its preview, if it was saved."""

    def reconnect(self, error: CalotypeError, delay: float) -> None:
        """Shows that the connection is lost. The client reconnects in `delay` seconds."""

    def wait(self, text: str) -> bool:
        """Shows why the command waits for the server. Returns False if the view has no place for it."""

    def finish(self, progress: Progress, image: Image, output: Path, index: int = 0) -> None:
        """Shows the final image."""

    def fail(self, error: CalotypeError, index: int = 0) -> None:
        """Shows an end without an image. The error message is printed on stderr separately."""


class BaseView:
    """Methods of `View` that do nothing."""

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Does nothing."""

    def reconnect(self, error: CalotypeError, delay: float) -> None:
        """Does nothing."""

    def wait(self, text: str) -> bool:
        """Returns False: there is no place for the text."""
        return False

    def fail(self, error: CalotypeError, index: int = 0) -> None:
        """Does nothing."""


def describe(progress: Progress) -> str:
    """Describes progress in a few words."""
    words = [progress.phase.replace("_", " ")]
    if progress.queue_position:
        words.append(f"position {progress.queue_position}")
    if progress.total_steps and progress.step:
        words.append(f"step {progress.step}/{progress.total_steps}")
    if progress.estimated_remaining is not None and not progress.phase.ended:
        seconds = progress.estimated_remaining
        words.append(f"{seconds:.0f} s left" if seconds < 100 else f"{seconds / 60:.0f} min left")
    if progress.previews_withdrawn:
        words.append("previews withdrawn")
    return ", ".join(words)


def summarize(progress: Progress, output: Path) -> str:
    """Describes the file of an image, with its seed and total time."""
    total = progress.timings.total if progress.timings else None
    return f"Saved {output} (seed {progress.seed}{'' if total is None else f', {total:.1f} s'})"
