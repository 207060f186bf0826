"""The cases of `make bench-gpu`: a model family, an image size and a number of steps. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["CASES", "MODELS", "Case", "cases_of"]


@dataclass(frozen=True, slots=True)
class Case:
    """One column of the table.

    Attributes:
        name: Its name in the table and the file.
        family: Name of the model family in `models.FAMILIES`. Cases of one family share a pipeline.
        title: Its description for people.
        size: Width and height in pixels.
        steps: Denoising steps.
        guidance: Guidance scale, as in the family's published examples; None if the pipeline takes none.
        gib: Device memory that the weights and one image need at most, in GiB.
        toy: Whether the modules are tiny.
    """

    name: str
    family: str
    title: str
    size: int
    steps: int
    guidance: float | None
    gib: float
    toy: bool = False

    @property
    def short_steps(self) -> int:
        """A smaller number of steps: the difference of two calls is the time of the steps between.

        Qwen-Image's scheduler needs two.
        """
        return max(2, self.steps // 4)


CASES = {
    case.name: case
    for case in (
        Case("bundled", "bundled", "bundled model, 128 px, 20 steps", 128, 20, 3.0, 1),
        Case("sd15", "sd15", "SD 1.5, 512 px, 20 steps", 512, 20, 7.5, 6),
        Case("sdxl", "sdxl", "SDXL, 1024 px, 20 steps", 1024, 20, 5.0, 16),
        Case("flux", "flux", "FLUX (12 B), 1024 px, 4 steps", 1024, 4, 3.5, 36),
        Case("flux20", "flux", "FLUX (12 B), 1024 px, 20 steps", 1024, 20, 3.5, 36),
        Case("qwen", "qwen", "Qwen-Image (20 B), 1024 px, 20 steps", 1024, 20, None, 56),
    )
}

MODELS = tuple(dict.fromkeys(case.family for case in CASES.values()))
"""Model families in the order in which they run: small ones first, so that an interrupted run has complete columns."""

_TOY_SIZE, _TOY_STEPS = 64, 6


def cases_of(family: str, *, toy: bool) -> list[Case]:
    """Returns the cases of a family; with `toy`, those of tiny modules with the same structure."""
    cases = [case for case in CASES.values() if case.family == family]
    if not toy or family == "bundled":
        return cases
    return [
        replace(case, size=_TOY_SIZE, steps=min(case.steps, _TOY_STEPS), gib=0.0, toy=True, title=f"toy {case.name}")
        for case in cases
    ]
