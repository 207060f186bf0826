"""Keeps prompts out of the log, unless the operator sets `--log-prompts`.

Calotype itself logs prompts only as the field `prompt`. But exceptions of a pipeline can quote their input, and their
tracebacks are logged. So every line that belongs to a request is searched for the prompts of that request.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import structlog
from google.protobuf import text_encoding

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["RedactPrompts", "redact_in_logs"]

_TEXTS = "_texts"
"""Context variable with the texts to redact."""

_FIELDS = ("prompt", "negative_prompt")
_PLACEHOLDER = "[redacted]"


def redact_in_logs(*texts: str | None) -> None:
    """Marks texts to redact from every log record emitted in this context, including threads it starts."""
    structlog.contextvars.bind_contextvars(**{_TEXTS: tuple(text for text in texts if text)})


class RedactPrompts:
    """A structlog processor that redacts prompts. Must run after tracebacks are formatted.

    Args:
        log_prompts: Whether to leave prompts in the log.
    """

    def __init__(self, *, log_prompts: bool) -> None:
        self._log_prompts = log_prompts

    def __call__(self, logger: Any, method: str, line: structlog.typing.EventDict) -> structlog.typing.EventDict:
        """Returns the line without prompts."""
        texts = line.pop(_TEXTS, ())
        if self._log_prompts:
            return line
        for name in _FIELDS:
            line.pop(name, None)
        # Longest first, because one form can contain another.
        forms = sorted({form for text in texts for form in _forms(text)}, key=len, reverse=True)
        for name in ("exception", "error"):
            if name in line and forms:
                line[name] = _redact(line[name], forms)
        return line


def _forms(text: str) -> Iterable[str]:
    """Yields the forms in which a text can be quoted: unchanged, and escaped by Python, JSON and protobuf."""
    yield text
    yield from (repr(text)[1:-1], ascii(text)[1:-1], json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])
    yield from (text_encoding.CEscape(text.encode(), as_utf8) for as_utf8 in (True, False))


def _redact(value: Any, forms: list[str]) -> Any:
    """Returns text, or a structure of dicts and lists, with every form replaced by a placeholder."""
    match value:
        case str():
            for form in forms:
                value = value.replace(form, _PLACEHOLDER)
            return value
        case dict():
            return {key: _redact(each, forms) for key, each in value.items()}
        case list():
            return [_redact(each, forms) for each in value]
    return value
