"""Tiny pipelines of many families with random weights: all layers of the real models, a few thousand weights each.

Nothing is downloaded. All weights are seeded, so two builds of a family are equal. A build takes 10 to 150 ms.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

import diffusers
import pytest
import torch
import transformers

from support.engine import tiny_transformers, tiny_unets
from support.engine.tiny_inputs import embeddings, words
from support.engine.tiny_unets import sd15

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "FAMILIES",
    "REPRESENTATIVE",
    "build",
    "every_family",
    "prompted",
    "sd15",
    "seeded_build",
    "shared",
    "with_prompts",
]

# The libraries warn about unusually small configurations, and draw progress bars.
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

_BUILDERS = {
    "aura_flow": tiny_transformers.aura_flow,
    "chroma": tiny_transformers.chroma,
    "cogview4": tiny_transformers.cogview4,
    "flux": tiny_transformers.flux,
    "flux2_klein": tiny_transformers.flux2,
    "lcm": tiny_unets.lcm,
    "lumina2": tiny_transformers.lumina2,
    "pixart_sigma": tiny_transformers.pixart_sigma,
    "qwen_image": tiny_transformers.qwen_image,
    "sana": tiny_transformers.sana,
    "sana_sprint": tiny_transformers.sana_sprint,
    "sd15": sd15,
    "sd3": tiny_transformers.sd3,
    "sdxl": tiny_unets.sdxl,
    "z_image": tiny_transformers.z_image,
}

FAMILIES = tuple(_BUILDERS)

REPRESENTATIVE = frozenset({"flux", "sana_sprint", "sd15", "sdxl", "z_image"})
"""Two UNets, with one and two text encoders; a flow transformer; one that takes lists; and a consistency model."""

every_family = pytest.mark.parametrize(
    "family", [name if name in REPRESENTATIVE else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
"""Decorates a test for every family; `make test` runs it for the representative ones only."""


def build(family: str, **arguments: Any) -> Any:
    """Builds a new pipeline of a family. The global random state stays as it was."""
    return seeded_build(_BUILDERS[family], **arguments)


def seeded_build(builder: Callable[..., Any], **arguments: Any) -> Any:
    """Builds a pipeline with seeded random weights. The global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = builder(**arguments)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@functools.cache
def shared(family: str) -> Any:
    """Returns the one shared pipeline of a family, which tests must not change."""
    return build(family)


def prompted(family: str) -> Any:
    """Builds a pipeline that accepts prompts."""
    return with_prompts(build(family), family)


def with_prompts(pipeline: Any, family: str) -> Any:
    """Gives other embeddings for every prompt to a pipeline without a text encoder, and returns the pipeline."""
    if pipeline.components.get("text_encoder") is not None:
        return pipeline
    encode_prompt = pipeline.encode_prompt
    signature = inspect.signature(encode_prompt)
    known = {name: value for name, value in embeddings(family).items() if name in signature.parameters}

    def encode(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        for name, value in known.items():
            text = bound.arguments.get("negative_prompt" if name.startswith("negative") else "prompt")
            bound.arguments[name] = _spoken(value, text)
        return encode_prompt(*bound.args, **bound.kwargs)

    pipeline.encode_prompt = encode
    return pipeline


def _spoken(value: Any, text: Any) -> Any:
    """Returns the embeddings of a text: the given ones plus noise that depends on the text."""
    if isinstance(value, list):
        return [_spoken(each, text) for each in value]
    if value is None or not value.is_floating_point():
        return value
    return value + words(text, *value.shape)
