"""Finds LoRA tags in prompts, as other programs write them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from calotype_server.types import Notice

if TYPE_CHECKING:
    from calotype_server.types import Job

__all__ = ["lora_tag_notices"]

_TAG = re.compile(r"<(?:lora|lyco):([^:<>]{1,100})(?::[^<>]{0,100})?>", re.IGNORECASE)


def lora_tag_notices(job: Job) -> tuple[Notice, ...]:
    """Returns a notice if a prompt has tags such as `<lora:name:0.8>`, which the model reads as text."""
    names = dict.fromkeys(name for text in (job.prompt, job.negative_prompt) for name in _TAG.findall(text or ""))
    if not names:
        return ()
    listed = ", ".join(list(names)[:8])
    message = (
        f"The model read the LoRA tags in the prompt as text ({listed}). Remove them, and name the LoRAs in the field "
        "loras instead."
    )
    return (Notice("LORA_TAG_IGNORED", message),)
