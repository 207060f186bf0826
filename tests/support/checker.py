"""A scripted safety checker for a real pipeline."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from support.engine import tiny

__all__ = ["StubChecker", "guarded"]


class StubChecker(torch.nn.Module):
    """Returns one verdict after another. True rejects the image; an exception is raised."""

    # Attributes of models of diffusers and transformers.
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, *verdicts: Any) -> None:
        super().__init__()
        self.verdicts = list(verdicts)
        self.seen: list[torch.Tensor] = []

    def forward(self, images: Any, clip_input: torch.Tensor) -> tuple[Any, list[bool]]:
        """Returns a black image if the verdict is True, like the checker of diffusers."""
        self.seen.append(clip_input)
        verdict = self.verdicts.pop(0)
        if isinstance(verdict, Exception):
            raise verdict
        return (torch.zeros_like(images) if verdict else images), [verdict] * len(images)


class _Extractor:
    """Passes unchanged pixels to the checker."""

    def __call__(self, pictures: list[Any], return_tensors: str) -> Any:
        pixels = torch.stack([torch.tensor(list(picture.tobytes())) for picture in pictures])
        return SimpleNamespace(to=lambda device: SimpleNamespace(pixel_values=pixels.to(device).float()))


def guarded(*verdicts: Any) -> Any:
    """Returns a tiny SD1.5 pipeline with a scripted checker."""
    pipeline = tiny.build("sd15")
    pipeline.register_modules(safety_checker=StubChecker(*verdicts), feature_extractor=_Extractor())
    return pipeline
