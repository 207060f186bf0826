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
    """Prints one line per step, for pipes and logs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = ""
        self._noticed: set[Notice] = set()

    def update(self, progress: Progress, path: Path | None) -> None:
        """Prints a line when its text differs from the last one."""
        for notice in progress.warnings:
            if notice not in self._noticed:
                self._noticed.add(notice)
                self._print(f"Note: {notice.message}")
        line = describe(progress)
        if line != self._last:
            self._last = line
            self._print(line if path is None else f"{line}: {path}")

    def reconnect(self, error: CalotypeError, delay: float) -> None:
        """Prints that the connection is lost."""
        self._print(RECONNECTING)

    def finish(self, progress: Progress, image: Image, output: Path) -> None:
        """Prints the path of the image."""
        self._print(summarize(progress, output))

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._console.file.flush()


class JsonView(BaseView):
    """Prints one JSON object per event and line."""

    def __init__(self) -> None:
        self._withdrawn = False

    def update(self, progress: Progress, path: Path | None) -> None:
        """Prints an event, unless the generation has ended: `finish` or `fail` prints the last event."""
        self._withdrawn = progress.previews_withdrawn
        if not progress.phase.ended:
            self._print(self._event(progress, path))

    def finish(self, progress: Progress, image: Image, output: Path) -> None:
        """Prints the last event, with the file of the image."""
        self._print(self._event(progress, None) | {"image": _facts(image), "output": str(output)})

    def fail(self, error: CalotypeError) -> None:
        """Prints the last event, with the error."""
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
