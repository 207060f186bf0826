"""Arguments for calls of the tiny pipelines: seeded embeddings replace missing text encoders."""

from __future__ import annotations

import zlib
from typing import Any

import torch

__all__ = ["arguments", "embeddings", "words"]

_PROMPT_TOKENS = 12
_NEGATIVE_TOKENS = 12


def arguments(family: str, *, seed: int = 1, steps: int = 3, **others: Any) -> dict[str, Any]:
    """Returns the arguments of a cheap call. The same seed gives the same latents.

    Args:
        family: One of `tiny.FAMILIES`.
        seed: Of the initial noise; the prompt does not depend on it.
        steps: Denoising steps; Sana-Sprint, which is distilled to two steps, always gets two.
        others: Arguments to add or replace.
    """
    call: dict[str, Any] = {
        "num_inference_steps": 2 if family == "sana_sprint" else steps,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
        "width": 64,
        "height": 64,
        **_OWN.get(family, {}),
        **embeddings(family),
    }
    return {**call, **others}


def embeddings(family: str) -> dict[str, Any]:
    """Returns a prompt for a family: text if it has a text encoder, otherwise embeddings."""
    return _PROMPTS[family]()


def words(text: Any, *shape: int) -> torch.Tensor:
    """Returns random embeddings of a text, or of a list with one: the same for the same text and shape."""
    first = text[0] if isinstance(text, (list, tuple)) else text
    return _random(zlib.crc32(f"{first or ''} {shape}".encode()), *shape)


def _text() -> dict[str, Any]:
    return {"prompt": "a red apple", "negative_prompt": "a pear"}


def _positive_text() -> dict[str, Any]:
    return {"prompt": "a red apple"}


def _pair(channels: int) -> dict[str, Any]:
    return {
        "prompt_embeds": _random(1, 1, _PROMPT_TOKENS, channels),
        "negative_prompt_embeds": _random(2, 1, _NEGATIVE_TOKENS, channels),
    }


def _masked_pair(channels: int, dtype: torch.dtype = torch.long) -> dict[str, Any]:
    return {
        **_pair(channels),
        "prompt_attention_mask": _mask(_PROMPT_TOKENS, 9, dtype),
        "negative_prompt_attention_mask": _mask(_NEGATIVE_TOKENS, 5, dtype),
    }


def _flux() -> dict[str, Any]:
    return {"prompt_embeds": _random(1, 1, _PROMPT_TOKENS, 32), "pooled_prompt_embeds": _random(3, 1, 32)}


def _sd3() -> dict[str, Any]:
    return {
        **_pair(32),
        "pooled_prompt_embeds": _random(3, 1, 64),
        "negative_pooled_prompt_embeds": _random(4, 1, 64),
    }


def _qwen_image() -> dict[str, Any]:
    return {
        **_pair(16),
        "prompt_embeds_mask": _mask(_PROMPT_TOKENS, _PROMPT_TOKENS),
        "negative_prompt_embeds_mask": _mask(_NEGATIVE_TOKENS, _NEGATIVE_TOKENS),
    }


def _sana_sprint() -> dict[str, Any]:
    return {
        "prompt_embeds": _random(1, 1, _PROMPT_TOKENS, 8),
        "prompt_attention_mask": _mask(_PROMPT_TOKENS, 9),
    }


def _z_image() -> dict[str, Any]:
    return {"prompt_embeds": [_random(1, 11, 16)], "negative_prompt_embeds": [_random(2, 5, 16)]}


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _mask(tokens: int, valid: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
    return (torch.arange(tokens) < valid).to(dtype)[None]


_PROMPTS = {
    "aura_flow": lambda: _masked_pair(32),
    "chroma": lambda: _masked_pair(32, torch.bool),
    "cogview4": lambda: _pair(32),
    "flux": _flux,
    "flux2_klein": lambda: _pair(16),
    "lcm": _positive_text,
    "lumina2": lambda: _masked_pair(8, torch.bool),
    "pixart_sigma": lambda: _masked_pair(32),
    "qwen_image": _qwen_image,
    "sana": lambda: _masked_pair(8),
    "sana_sprint": _sana_sprint,
    "sd15": _text,
    "sd3": _sd3,
    "sdxl": _text,
    "z_image": _z_image,
}

# The pipelines with binning round sizes to those of the real models, which are far larger.
_UNBINNED = {"use_resolution_binning": False}
_OWN: dict[str, dict[str, Any]] = {
    "lumina2": {"width": 32, "height": 32},
    "pixart_sigma": {**_UNBINNED, "negative_prompt": None},
    "qwen_image": {"true_cfg_scale": 3.0},
    "sana": {**_UNBINNED, "width": 128, "height": 128, "negative_prompt": None},
    "sana_sprint": {**_UNBINNED, "width": 128, "height": 128},
}
