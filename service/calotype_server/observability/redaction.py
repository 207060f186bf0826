"""Keeps prompts out of the log, unless the operator asks for them.

Nothing of ours logs a prompt but as the field `prompt`. But what a pipeline raises may quote what it was given, and its
traceback is logged: so whatever is logged on behalf of a request is searched for its texts.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import structlog
from google.protobuf import text_encoding

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["RedactPrompts", "redact_in_logs"]

_KEY = "_texts"
_FIELDS = ("prompt", "negative_prompt")
_INSTEAD = "[withheld]"


def redact_in_logs(*texts: str | None) -> None:
    """Says what the work that this task goes on with must not be heard to quote; threads that it starts inherit it."""
    structlog.contextvars.bind_contextvars(**{_KEY: tuple(text for text in texts if text)})


class RedactPrompts:
    """A processor of structlog, for lines whose traceback is text already.

    Args:
        wanted: Whether prompts are logged after all.
    """

    def __init__(self, *, wanted: bool) -> None:
        self._wanted = wanted

    def __call__(self, logger: Any, method: str, line: structlog.typing.EventDict) -> structlog.typing.EventDict:
        """Returns the line without what must not be in it."""
        texts = line.pop(_KEY, ())
        if self._wanted:
            return line
        for name in _FIELDS:
            line.pop(name, None)
        # The longest first: one may hold another.
        forms = sorted({form for text in texts for form in _forms(text)}, key=len, reverse=True)
        for name in ("exception", "error"):
            if name in line and forms:
                line[name] = _without(line[name], forms)
        return line


def _forms(text: str) -> Iterable[str]:
    """How a text is quoted: as it is, and as Python, JSON and protobuf escape it."""
    yield text
    yield from (repr(text)[1:-1], ascii(text)[1:-1], json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])
    yield from (text_encoding.CEscape(text.encode(), as_utf8) for as_utf8 in (True, False))


def _without(value: Any, forms: list[str]) -> Any:
    match value:
        case str():
            for form in forms:
                value = value.replace(form, _INSTEAD)
            return value
        case dict():
            return {key: _without(each, forms) for key, each in value.items()}
        case list():
            return [_without(each, forms) for each in value]
    return value
