"""What `calotype generate` shows: a live picture, plain lines, or JSON events."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .inline_image import detect_protocol, picture_renderer
from .quiet import quiet_keyboard

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from rich.console import Console, RenderableType

    from .._errors import CalotypeError
    from .._image import Image
    from .._types import Notice, Progress

__all__ = ["JsonView", "LiveView", "PlainView", "View", "choose_view", "describe"]

_BAR_COLUMNS = 24
_MAX_ROWS = 24
_OTHER_ROWS = 4
_RECONNECTING = "connection lost, reconnecting ..."


class View(Protocol):
    """Shows one generation."""

    def __enter__(self) -> View: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def update(self, progress: Progress, path: Path | None) -> None:
        """Shows progress; `path` is where its preview was kept."""

    def reconnect(self, error: CalotypeError, delay: float) -> None:
        """Shows that the connection is lost, and will be made again in `delay` seconds."""

    def finish(self, progress: Progress, image: Image, output: Path) -> None:
        """Shows the end with an image."""

    def fail(self, error: CalotypeError) -> None:
        """Shows the end without one. The message for people goes to stderr in any case."""


def choose_view(console: Console, *, as_json: bool) -> View:
    """Chooses what suits the output."""
    if as_json:
        return JsonView()
    return LiveView(console) if console.is_terminal and not console.is_dumb_terminal else PlainView(console)


def describe(progress: Progress) -> str:
    """Says in a few words where a generation stands."""
    words = [progress.phase.replace("_", " ")]
    if progress.queue_position:
        words.append(f"place {progress.queue_position}")
    if progress.total_steps and progress.step:
        words.append(f"step {progress.step}/{progress.total_steps}")
    if progress.estimated_remaining is not None and not progress.phase.ended:
        seconds = progress.estimated_remaining
        words.append(f"{seconds:.0f} s left" if seconds < 100 else f"{seconds / 60:.0f} min left")
    if progress.previews_withdrawn:
        words.append("previews withdrawn")
    return ", ".join(words)


def _summary(progress: Progress, output: Path) -> str:
    total = progress.timings.total if progress.timings else None
    return f"Saved {output} (seed {progress.seed}{'' if total is None else f', {total:.1f} s'})"


class _Silent:
    """The parts of a view that most do not need."""

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leaves nothing behind."""

    def reconnect(self, error: CalotypeError, delay: float) -> None:
        """What comes next will tell."""

    def fail(self, error: CalotypeError) -> None:
        """The message on stderr says it all."""


class PlainView(_Silent):
    """One line for each step, for pipes and logs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = ""
        self._noticed: set[Notice] = set()

    def update(self, progress: Progress, path: Path | None) -> None:
        """Prints a line when there is something new to say."""
        for notice in progress.warnings:
            if notice not in self._noticed:
                self._noticed.add(notice)
                self._print(f"Note: {notice.message}")
        line = describe(progress)
        if line != self._last:
            self._last = line
            self._print(line if path is None else f"{line}: {path}")

    def reconnect(self, error: CalotypeError, delay: float) -> None:
        """Prints a line."""
        self._print(_RECONNECTING)

    def finish(self, progress: Progress, image: Image, output: Path) -> None:
        """Prints where the image is."""
        self._print(_summary(progress, output))

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._console.file.flush()


class JsonView(_Silent):
    """One JSON object for each event, on a line of its own."""

    def __init__(self) -> None:
        self._withdrawn = False

    def update(self, progress: Progress, path: Path | None) -> None:
        """Prints an event. An end waits for `finish` or `fail`."""
        self._withdrawn = progress.previews_withdrawn
        if not progress.phase.ended:
            self._print(self._event(progress, path))

    def finish(self, progress: Progress, image: Image, output: Path) -> None:
        """Prints the last event."""
        self._print(self._event(progress, None) | {"image": _facts(image), "output": str(output)})

    def fail(self, error: CalotypeError) -> None:
        """Prints the last event."""
        facts: dict[str, Any] = {"code": error.code, "reason": error.reason, "message": error.message}
        facts |= {"retry_after": error.retry_after, "metadata": error.metadata}
        facts["violations"] = [violation._asdict() for violation in getattr(error, "violations", ())]
        phase = "cancelled" if error.code == "CANCELLED" else "failed"
        self._print({"phase": phase, "previews_withdrawn": self._withdrawn, "error": facts})

    def _event(self, progress: Progress, path: Path | None) -> dict[str, Any]:
        preview = None if progress.preview is None else _facts(progress.preview)
        if preview is not None and path is not None:
            preview["path"] = str(path)
        plain = {name: getattr(progress, name) for name in type(progress).__dataclass_fields__}
        warnings = [asdict(notice) for notice in progress.warnings]
        timings = asdict(progress.timings) if progress.timings else None
        return plain | {"preview": preview, "warnings": warnings, "timings": timings}

    def _print(self, event: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()


def _facts(image: Image) -> dict[str, Any]:
    return {"format": image.format, "width": image.width, "height": image.height, "bytes": len(image.data)}


class LiveView(_Silent):
    """The picture as it forms, above a progress bar."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._picture: RenderableType | None = None
        self._noticed: dict[Notice, None] = {}

    def __enter__(self) -> LiveView:
        """Takes over the terminal."""
        with ExitStack() as stack:
            stack.enter_context(quiet_keyboard())
            protocol = detect_protocol()
            colourless = self._console.no_color or self._console.color_system is None
            # Half blocks in one colour are a grey wall.
            self._render = None if protocol == "blocks" and colourless else picture_renderer(protocol)
            # Drawn when there is something new and at no other time: sending a picture again makes it flicker.
            self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="crop")
            stack.enter_context(self._live)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Gives the terminal back."""
        self._stack.close()

    def update(self, progress: Progress, path: Path | None) -> None:
        """Draws what is new."""
        self._draw(progress, progress.preview)

    def reconnect(self, error: CalotypeError, delay: float) -> None:
        """Leaves the picture as it is, and says so below."""
        parts = [] if self._picture is None else [self._picture]
        self._live.update(Group(*parts, *self._notes(), Text(_RECONNECTING)), refresh=True)

    def finish(self, progress: Progress, image: Image, output: Path) -> None:
        """Draws the final image, and says where it is."""
        self._draw(progress, image)
        # What is printed while it is live goes above the picture.
        self._live.stop()
        self._console.print(_summary(progress, output), markup=False, highlight=False, soft_wrap=True)

    def _draw(self, progress: Progress, image: Image | None) -> None:
        old = self._picture
        self._noticed |= dict.fromkeys(progress.warnings)
        if progress.previews_withdrawn:
            self._picture = None
        elif image is not None and self._render is not None:
            rows = max(1, min(_MAX_ROWS, self._console.height - _OTHER_ROWS - len(self._noticed)))
            self._picture = self._render(image, self._console.width, rows)
        parts: list[RenderableType] = [] if self._picture is None else [self._picture]
        self._live.update(Group(*parts, *self._notes(), _status_line(progress)), refresh=True)
        if old is not None and old is not self._picture and hasattr(old, "cleanup"):
            old.cleanup()

    def _notes(self) -> list[Text]:
        return [Text(f"Note: {notice.message}", style="yellow") for notice in self._noticed]


def _status_line(progress: Progress) -> Table:
    line = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=progress.total_steps or 1, completed=progress.step, width=_BAR_COLUMNS)
    line.add_row(bar, Text(describe(progress), no_wrap=True, overflow="ellipsis"))
    return line
