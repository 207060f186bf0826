"""How prompts are read."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["PromptSyntax"]


class PromptSyntax(IntEnum):
    """How the server reads a prompt."""

    PLAIN = 1
    """Every character is text."""
    WEIGHTED = 2
    """Parts can have weights, as in Automatic1111's web UI: `(red:1.4)`."""
