"""A safety checker that says what the test wants, for a real pipeline."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from support.engine import tiny

__all__ = ["StubChecker", "guarded"]


class StubChecker(torch.nn.Module):
    """Answers with one verdict after another: True objects, an exception is raised."""

    # As diffusers' and transformers' models have them.
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, *verdicts: Any) -> None:
        super().__init__()
        self.verdicts = list(verdicts)
        self.seen: list[torch.Tensor] = []

    def forward(self, images: Any, clip_input: torch.Tensor) -> tuple[Any, list[bool]]:
        """As diffusers' own: a picture that it objects to comes back black."""
        self.seen.append(clip_input)
        verdict = self.verdicts.pop(0)
        if isinstance(verdict, Exception):
            raise verdict
        return (torch.zeros_like(images) if verdict else images), [verdict] * len(images)


class _Extractor:
    """Gives the checker the pixels as they are."""

    def __call__(self, pictures: list[Any], return_tensors: str) -> Any:
        pixels = torch.stack([torch.tensor(list(picture.tobytes())) for picture in pictures])
        return SimpleNamespace(to=lambda device: SimpleNamespace(pixel_values=pixels.to(device).float()))


def guarded(*verdicts: Any) -> Any:
    """A tiny SD1.5 with such a checker."""
    pipeline = tiny.build("sd15")
    pipeline.register_modules(safety_checker=StubChecker(*verdicts), feature_extractor=_Extractor())
    return pipeline
