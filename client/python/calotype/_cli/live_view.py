"""Shows the image of a running generation in the terminal."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .inline_image import detect_protocol, picture_renderer
from .quiet import quiet_keyboard
from .view import RECONNECTING, BaseView, describe, summarize

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from rich.console import Console, RenderableType

    from .._errors import CalotypeError
    from .._image import Image
    from .._types import Notice, Progress

__all__ = ["LiveView"]

_BAR_COLUMNS = 24
_MAX_ROWS = 24
_OTHER_ROWS = 4


class LiveView(BaseView):
    """Draws the newest preview above a progress bar."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._picture: RenderableType | None = None
        self._noticed: dict[Notice, None] = {}

    def __enter__(self) -> LiveView:
        """Prepares the terminal."""
        with ExitStack() as stack:
            stack.enter_context(quiet_keyboard())
            protocol = detect_protocol()
            colourless = self._console.no_color or self._console.color_system is None
            # Half blocks in a single colour show no picture.
            self._render = None if protocol == "blocks" and colourless else picture_renderer(protocol)
            # No automatic refresh: drawing the same picture again makes it flicker.
            self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="crop")
            stack.enter_context(self._live)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Restores the terminal."""
        self._stack.close()

    def update(self, progress: Progress, path: Path | None) -> None:
        """Draws progress, and its preview if it has one."""
        self._draw(progress, progress.preview)

    def reconnect(self, error: CalotypeError, delay: float) -> None:
        """Keeps the picture, and shows below it that the connection is lost."""
        self.wait(RECONNECTING)

    def wait(self, text: str) -> bool:
        """Keeps the picture, and shows the text below it."""
        parts = [] if self._picture is None else [self._picture]
        self._live.update(Group(*parts, *self._notes(), Text(text)), refresh=True)
        return True

    def finish(self, progress: Progress, image: Image, output: Path) -> None:
        """Draws the final image, and prints the path of its file."""
        self._draw(progress, image)
        # Text that is printed during the live display appears above the picture.
        self._live.stop()
        self._console.print(summarize(progress, output), markup=False, highlight=False, soft_wrap=True)

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
