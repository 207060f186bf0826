"""Shows generations in a notebook. Needs an extra: pip install 'calotype[notebook]'.

Usage, in a cell::

    from calotype import Client
    from calotype.notebook import show

    image = show(Client().generate("a red apple", seed=1))
"""

from __future__ import annotations

import base64
import html
from typing import TYPE_CHECKING

try:
    from IPython.display import HTML, display
except ImportError:
    raise ImportError("calotype.notebook needs an extra: pip install 'calotype[notebook]'") from None

from ._resume.waits import is_loading

if TYPE_CHECKING:
    from ._async.generation import AsyncGeneration
    from ._errors import CalotypeError
    from ._image import Image
    from ._sync.generation import Generation
    from ._types import Notice, Progress

__all__ = ["ashow", "show"]


def show(generation: Generation) -> Image:
    """Displays a generation while it runs, and returns its final image.

    Each preview replaces the previous one, with the phase, the step, the seed and warnings below it. While the server
    loads its model, or the client reconnects, the caption says so. Interrupting the cell cancels the generation on the
    server.

    Raises:
        CalotypeError: The generation ended without an image.
    """
    cell = _Cell()
    generation.on_reconnect(cell.wait)
    for progress in generation:
        cell.update(progress, generation.warnings)
    image = generation.result()
    cell.finish(image)
    return image


async def ashow(generation: AsyncGeneration) -> Image:
    """Like `show`, for a generation of an `AsyncClient`.

    Raises:
        CalotypeError: The generation ended without an image.
    """
    cell = _Cell()
    generation.on_reconnect(cell.wait)
    async for progress in generation:
        cell.update(progress, generation.warnings)
    image = await generation.result()
    cell.finish(image)
    return image


class _Cell:
    """The output of a cell: the newest image and a caption."""

    def __init__(self) -> None:
        self._image: Image | None = None
        self._caption = ""
        self._handle = display(_html(""), display_id=True)  # type: ignore[no-untyped-call]

    def update(self, progress: Progress, warnings: tuple[Notice, ...]) -> None:
        """Shows progress."""
        self._image = None if progress.previews_withdrawn else progress.preview or self._image
        words = [progress.phase.replace("_", " ")]
        if progress.step:
            words.append(f"step {progress.step}/{progress.total_steps}")
        if progress.previews_withdrawn:
            words.append("previews withdrawn")
        self._caption = ", ".join([*words, f"seed {progress.seed}", *(notice.message for notice in warnings)])
        self._show()

    def wait(self, error: CalotypeError, _: float) -> None:
        """Shows why no progress arrives, and keeps the image."""
        loading = "The server is loading its model; waiting ..."
        self._caption = loading if is_loading(error) else "Connection lost; reconnecting ..."
        self._show()

    def finish(self, image: Image) -> None:
        """Shows the final image."""
        self._image = image
        self._show()

    def _show(self) -> None:
        element = ""
        if self._image is not None:
            data = base64.b64encode(self._image.data).decode()
            source = f"data:image/{self._image.format};base64,{data}"
            # Previews are smaller than the image. A fixed width keeps the notebook from jumping.
            element = f'<img src="{source}" alt="{html.escape(self._caption)}" style="width: 384px; max-width: 100%">'
        self._handle.update(_html(f"<figure>{element}<figcaption>{html.escape(self._caption)}</figcaption></figure>"))


def _html(text: str) -> HTML:
    return HTML(text)  # type: ignore[no-untyped-call]
