"""Shows the images of running generations in the terminal."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .filmstrip import grid
from .inline_image import detect_protocol, picture_renderer
from .quiet import quiet_keyboard
from .view import RECONNECTING, BaseView, describe, summarize

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    import PIL.Image
    from rich.console import Console, RenderableType

    from .._errors import CalotypeError
    from .._image import Image
    from .._types import Notice, Progress

__all__ = ["LiveView"]

_BAR_COLUMNS = 24
_MAX_ROWS = 24
_OTHER_ROWS = 4


class LiveView(BaseView):
    """Draws the newest preview above a progress bar, or those of several generations in a grid.

    Args:
        console: The terminal.
        count: Number of generations.
    """

    def __init__(self, console: Console, count: int = 1) -> None:
        self._console = console
        self._count = count
        self._picture: RenderableType | None = None
        self._images: dict[int, PIL.Image.Image] = {}
        self._progress: dict[int, Progress] = {}
        self._failed = 0
        self._saved: list[str] = []
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

    def update(self, progress: Progress, path: Path | None, index: int = 0) -> None:
        """Draws progress, and its preview if it has one."""
        self._draw(progress, progress.preview, index)

    def reconnect(self, error: CalotypeError, delay: float) -> None:
        """Keeps the picture, and shows below it that the connection is lost."""
        self.wait(RECONNECTING)

    def wait(self, text: str) -> bool:
        """Keeps the picture, and shows the text below it."""
        parts = [] if self._picture is None else [self._picture]
        self._live.update(Group(*parts, *self._notes(), Text(text)), refresh=True)
        return True

    def finish(self, progress: Progress, image: Image, output: Path, index: int = 0) -> None:
        """Draws the final image, and prints the paths of the files after the last one."""
        self._draw(progress, image, index)
        self._saved.append(summarize(progress, output))
        self._end()

    def fail(self, error: CalotypeError, index: int = 0) -> None:
        """Prints the paths of the files if this was the last generation."""
        self._failed += 1
        self._end()

    def _end(self) -> None:
        if len(self._saved) + self._failed < self._count:
            return
        # Text that is printed during the live display appears above the picture.
        self._live.stop()
        for line in self._saved:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _draw(self, progress: Progress, image: Image | None, index: int) -> None:
        old = self._picture
        self._noticed |= dict.fromkeys(progress.warnings)
        self._progress[index] = progress
        if progress.previews_withdrawn:
            self._images.pop(index, None)
        elif image is not None:
            self._images[index] = image.to_pil()
        if not self._images:
            self._picture = None
        elif self._render is not None and (image is not None or progress.previews_withdrawn):
            rows = max(1, min(_MAX_ROWS, self._console.height - _OTHER_ROWS - len(self._noticed)))
            picture = self._images[0] if self._count == 1 else grid(self._images, self._count)
            self._picture = self._render(picture, self._console.width, rows)
        parts: list[RenderableType] = [] if self._picture is None else [self._picture]
        self._live.update(Group(*parts, *self._notes(), self._status_line(progress)), refresh=True)
        if old is not None and old is not self._picture and hasattr(old, "cleanup"):
            old.cleanup()

    def _notes(self) -> list[Text]:
        return [Text(f"Note: {notice.message}", style="yellow") for notice in self._noticed]

    def _status_line(self, newest: Progress) -> Table:
        members = self._progress.values()
        # Members that have sent nothing yet have as many steps as the others.
        total = max(each.total_steps for each in members) * self._count
        text = describe(newest)
        if self._count > 1:
            ended = sum(each.phase.ended for each in members) + self._failed
            text = f"{ended} of {self._count} done, {text}"
        line = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=total or 1, completed=sum(each.step for each in members), width=_BAR_COLUMNS)
        line.add_row(bar, Text(text, no_wrap=True, overflow="ellipsis"))
        return line
