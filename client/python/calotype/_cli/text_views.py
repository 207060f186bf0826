"""Shows a generation in text, for pipes, logs and programs."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .view import RECONNECTING, BaseView, describe, summarize

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from .._errors import CalotypeError
    from .._image import Image
    from .._types import Notice, Progress

__all__ = ["JsonView", "PlainView"]


class PlainView(BaseView):
    """Prints one line per step, for pipes and logs.

    Args:
        console: The terminal.
        count: Number of generations. If there are several, each line starts with the number of its generation.
    """

    def __init__(self, console: Console, count: int = 1) -> None:
        self._console = console
        self._count = count
        self._last: dict[int, str] = {}
        self._noticed: set[Notice] = set()

    def update(self, progress: Progress, path: Path | None, index: int = 0) -> None:
        """Prints a line when its text differs from the last one."""
        for notice in progress.warnings:
            if notice not in self._noticed:
                self._noticed.add(notice)
                self._print(f"Note: {notice.message}")
        line = describe(progress)
        if line != self._last.get(index):
            self._last[index] = line
            number = f"image {index + 1}: " if self._count > 1 else ""
            self._print(number + (line if path is None else f"{line}: {path}"))

    def reconnect(self, error: CalotypeError, delay: float) -> None:
        """Prints that the connection is lost."""
        self._print(RECONNECTING)

    def finish(self, progress: Progress, image: Image, output: Path, index: int = 0) -> None:
        """Prints the path of the image."""
        self._print(summarize(progress, output))

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._console.file.flush()


class JsonView(BaseView):
    """Prints one JSON object per event and line.

    Args:
        count: Number of generations. If there are several, each event has the `index` of its generation.
    """

    def __init__(self, count: int = 1) -> None:
        self._count = count
        self._withdrawn: set[int] = set()

    def update(self, progress: Progress, path: Path | None, index: int = 0) -> None:
        """Prints an event, unless the generation has ended: `finish` or `fail` prints the last event."""
        if progress.previews_withdrawn:
            self._withdrawn.add(index)
        if not progress.phase.ended:
            self._print(self._event(progress, path), index)

    def finish(self, progress: Progress, image: Image, output: Path, index: int = 0) -> None:
        """Prints the last event, with the file of the image."""
        self._print(self._event(progress, None) | {"image": _facts(image), "output": str(output)}, index)

    def fail(self, error: CalotypeError, index: int = 0) -> None:
        """Prints the last event, with the error."""
        facts: dict[str, Any] = {"code": error.code, "reason": error.reason, "message": error.message}
        facts |= {"retry_after": error.retry_after, "metadata": error.metadata}
        facts["violations"] = [violation._asdict() for violation in getattr(error, "violations", ())]
        phase = "cancelled" if error.code == "CANCELLED" else "failed"
        self._print({"phase": phase, "previews_withdrawn": index in self._withdrawn, "error": facts}, index)

    def _event(self, progress: Progress, path: Path | None) -> dict[str, Any]:
        preview = None if progress.preview is None else _facts(progress.preview)
        if preview is not None and path is not None:
            preview["path"] = str(path)
        plain = {name: getattr(progress, name) for name in type(progress).__dataclass_fields__}
        warnings = [asdict(notice) for notice in progress.warnings]
        timings = asdict(progress.timings) if progress.timings else None
        return plain | {"preview": preview, "warnings": warnings, "timings": timings}

    def _print(self, event: dict[str, Any], index: int) -> None:
        if self._count > 1:
            event = {"index": index, **event}
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()


def _facts(image: Image) -> dict[str, Any]:
    return {"format": image.format, "width": image.width, "height": image.height, "bytes": len(image.data)}
