"""Validation of the syntax of prompts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from calotype.v1 import calotype_pb2 as pb
from calotype_server.api.validation import validate
from calotype_server.errors import InvalidRequest
from calotype_server.images import metadata
from calotype_server.types import PromptSyntax
from support.engine.fake_engine import MODEL
from support.service import LIMITS

WEIGHTED = replace(MODEL, prompt_syntaxes=tuple(PromptSyntax))


def request(syntax: int) -> pb.GenerateRequest:
    """Returns a request with this syntax."""
    return pb.GenerateRequest(prompt="a cat", prompt_syntax=syntax)  # type: ignore[arg-type]


def test_plain_text_is_the_default() -> None:
    """A request without a syntax has a plain prompt, also if the model supports weights."""
    for syntax, expected in (
        (pb.PROMPT_SYNTAX_UNSPECIFIED, PromptSyntax.PLAIN),
        (pb.PROMPT_SYNTAX_PLAIN, PromptSyntax.PLAIN),
        (pb.PROMPT_SYNTAX_WEIGHTED, PromptSyntax.WEIGHTED),
    ):
        job, _ = validate(request(syntax), WEIGHTED, LIMITS)
        assert job.prompt_syntax is expected


@pytest.mark.parametrize(
    ("syntax", "expected"),
    [
        (pb.PROMPT_SYNTAX_WEIGHTED, "WEIGHTED, which .* does not support, must be one of PLAIN"),
        (99, "unknown value 99"),
    ],
)
def test_a_syntax_that_the_model_lacks_is_rejected(syntax: int, expected: str) -> None:
    """The violation lists the supported syntaxes."""
    with pytest.raises(InvalidRequest, match=expected) as caught:
        validate(request(syntax), MODEL, LIMITS)
    assert [violation.field for violation in caught.value.violations] == ["prompt_syntax"]


def test_the_file_says_that_the_prompt_has_weights() -> None:
    """The embedded parameters name the syntax if it is not plain text."""
    job, _ = validate(request(pb.PROMPT_SYNTAX_WEIGHTED), WEIGHTED, LIMITS)
    assert "Prompt syntax: weighted, " in metadata.describe(job, WEIGHTED)
    assert "syntax" not in metadata.describe(replace(job, prompt_syntax=PromptSyntax.PLAIN), WEIGHTED)
