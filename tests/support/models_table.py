"""Writes service/MODELS.md from the installed diffusers and from trials of tiny pipelines: `make models`.

A trial draws images with a tiny pipeline of the family, with random weights: `support.engine.families.trial`.
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import structlog
import torch

from calotype_server.engine.capabilities import denoiser_name, read_guidance
from calotype_server.engine.loading.checks.supported import check_pipeline
from calotype_server.errors import ModelUnavailable
from support.engine import families
from support.engine.families.trial import try_pipeline

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["PAGE", "Row", "class_rows", "family_row", "main", "page", "rejection", "tried_families"]

PAGE = Path(__file__).parents[2] / "service" / "MODELS.md"

_CLOSE = 2
"""Levels of 255 by which equal images may differ after rounding."""

_HEAD = """# Models

<!-- Written by `make models` from the installed diffusers and from trials of tiny pipelines. -->

Calotype serves every pipeline of diffusers that turns text into images in a latent space and lets its steps be
observed. `calotype model` shows the sizes, schedulers and limits of the model that a server has loaded. This page lists
the pipeline classes of diffusers {version}, and {count} tiny pipelines with random weights that were tried.

## Tried

Each row is one kind of model. Two images are drawn, alone and at the same time, and compared with the image of a plain
call of the diffusers pipeline with its own defaults.

- *as plain*: the image is bitwise that of the plain call.
- *last preview*: the preview of the last step, decoded by the full VAE, is the image, up to two of 255 levels. Some
  schedulers end with a little noise, which the preview does not have.
- *joined*: concurrent requests share calls of the denoiser; otherwise the page states why they do not.
- *together*: an image drawn at the same time as another one is the image drawn alone, up to one of 255 levels.
- *guidance*: the default of `guidance_scale`, and the parameter of the pipeline if it has another name. Empty: no
  guidance scale has an effect, so requests cannot set one.
- *negative prompt*: whether requests can set one, and the guidance above which it has an effect.

| model | pipeline | as plain | last preview | joined | together | guidance | negative prompt |
|---|---|---|---|---|---|---|---|
"""

_CLASSES = """
## Pipeline classes

- *tried*: its row above says how well it works.
- *not tried*: nothing in the class speaks against it. The server draws one step when it loads the model, and if this
  fails, as with the pipelines that need a ControlNet's image, it reports the pipeline's own reason and stops.
- All others are rejected, with the message in the table.

| pipeline class | |
|---|---|
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table.

    Attributes:
        key: Its first cell.
        cells: The others.
    """

    key: str
    cells: tuple[str, ...]

    def __str__(self) -> str:
        return f"| {' | '.join((self.key, *self.cells))} |"


def page() -> str:
    """Returns the whole page. It takes about a minute."""
    tried = [family_row(family) for family in tried_families()]
    text = _HEAD.format(version=diffusers.__version__, count=len(tried))
    lines = [*map(str, tried), *_CLASSES.splitlines(), *map(str, class_rows({row.cells[0] for row in tried}))]
    return text + "\n".join(lines) + "\n"


def tried_families() -> list[str]:
    """Returns the names of the tiny pipelines that the service accepts."""
    return [family for family in families.ALL if rejection(type(families.prompted(family))) is None]


def family_row(family: str) -> Row:
    """Tries a family and returns its row."""
    pipeline = families.prompted(family)
    guidance = read_guidance(pipeline)
    kind = type(pipeline).__name__
    with tempfile.TemporaryDirectory() as cache:
        trial = try_pipeline(pipeline, families.prompted(family), Path(cache))
    scale = ""
    if guidance.parameter is not None:
        scale = f"{guidance.default:g}"
        scale += "" if guidance.parameter == "guidance_scale" else f" (`{guidance.parameter}`)"
    negative = "no"
    if guidance.takes_negative_prompt:
        negative = "yes" if guidance.threshold is None else f"above {guidance.threshold:g}"
    return Row(
        family,
        (
            f"`{kind}`",
            _difference(trial.plain_difference, 0),
            _difference(trial.preview_difference, _CLOSE),
            _numberless(trial.unbatched_reason) or "yes",
            _difference(trial.together_difference, 1),
            scale,
            negative,
        ),
    )


def class_rows(tried: Iterable[str] = ()) -> list[Row]:
    """Returns the rows of all pipeline classes that diffusers exports: tried, not tried, and rejected ones."""
    tried = set(tried)
    groups: tuple[list[Row], ...] = ([], [], [])
    for kind in pipeline_classes():
        name = f"`{kind.__name__}`"
        reason = rejection(kind)
        group = 2 if reason else 0 if name in tried else 1
        groups[group].append(Row(name, (reason or ("tried", "not tried")[group],)))
    return [row for rows in groups for row in rows]


def pipeline_classes() -> list[Any]:
    """Returns the pipeline classes that diffusers exports, sorted by name."""
    found = {}
    for name in dir(diffusers):
        kind = getattr(diffusers, name, None)
        if inspect.isclass(kind) and issubclass(kind, diffusers.DiffusionPipeline) and "__call__" in dir(kind):
            found[kind.__name__] = kind
    return [found[name] for name in sorted(found)]


def rejection(kind: Any) -> str | None:
    """Returns the message with which the service rejects a pipeline class, or None if it accepts it.

    The decision needs an instance. This one has something for every component that the class accepts.
    """
    pipeline = kind.__new__(kind)
    pipeline.__dict__.update(dict.fromkeys(inspect.signature(kind.__init__).parameters, torch.nn.Identity()))
    try:
        check_pipeline("MODEL", pipeline)
        denoiser_name(pipeline)
    except ModelUnavailable as error:
        return str(error).removeprefix(f"'MODEL' is a {kind.__name__}, which ")
    return None


def _difference(levels: int | None, allowed: int) -> str:
    if levels is None:
        return "fails"
    return "yes" if levels <= allowed else "no"


def _numberless(reason: str) -> str:
    """Removes measured numbers, which depend on the machine."""
    return re.sub(r" by [\d.e+-]+;.*", ".", reason)


def main() -> None:
    """Prints the page."""
    # Failures are results here.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    torch.set_num_threads(1)
    sys.stdout.write(page())


if __name__ == "__main__":
    main()
