"""Finds prompts with weights that have no effect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from calotype_server.engine.prompts.support import prompt_syntaxes
from calotype_server.engine.prompts.weights import has_weights
from calotype_server.types import Notice, PromptSyntax

if TYPE_CHECKING:
    from calotype_server.types import Job

__all__ = ["ignored_weights"]


def ignored_weights(pipeline: Any, job: Job) -> tuple[Notice, ...]:
    """Returns a notice if a prompt contains explicit weights, but the job reads its prompts as plain text."""
    if job.prompt_syntax is not PromptSyntax.PLAIN or not any(
        map(has_weights, (job.prompt, job.negative_prompt or ""))
    ):
        return ()
    remedy = "this model does not support them"
    if PromptSyntax.WEIGHTED in prompt_syntaxes(pipeline):
        remedy = "set prompt_syntax to WEIGHTED to use them"
    return (Notice("PROMPT_WEIGHTS_IGNORED", f"Weights such as (red:1.4) were read as text; {remedy}."),)
