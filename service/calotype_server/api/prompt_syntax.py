"""Checks how a request wants its prompts to be read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calotype_server.api.enums import PROMPT_SYNTAXES
from calotype_server.types import PromptSyntax

if TYPE_CHECKING:
    from collections.abc import Callable

    from calotype.v1 import calotype_pb2 as pb
    from calotype_server.types import ModelInfo

__all__ = ["prompt_syntax"]


def prompt_syntax(request: pb.GenerateRequest, model: ModelInfo, reject: Callable[[str, str], None]) -> PromptSyntax:
    """Returns the syntax of the prompts; rejects one that the model does not support.

    Args:
        request: The request of the caller.
        model: Abilities of the model.
        reject: Adds a violation: the name of the field and a description.
    """
    syntax = PROMPT_SYNTAXES.from_proto(request.prompt_syntax)
    if syntax is None:
        reject("prompt_syntax", f"has the unknown value {request.prompt_syntax}")
    elif syntax not in model.prompt_syntaxes:
        names = ", ".join(each.name for each in model.prompt_syntaxes)
        reject("prompt_syntax", f"is {syntax.name}, which {model.pipeline} does not support, must be one of {names}")
    return syntax or PromptSyntax.PLAIN
