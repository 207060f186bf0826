"""Reads the weights in a prompt, in the syntax of Automatic1111's web UI."""

from __future__ import annotations

import itertools
import re

__all__ = ["has_weights", "parse_weights"]

_STEP = 1.1
"""A pair of round brackets multiplies the weight of its content by this, a pair of square ones divides it."""

_ENDS = {"(": ")", "[": "]"}

_EXPLICIT = re.compile(r":\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)")
"""The weight at the end of round brackets, with the bracket."""

_LIKELY = re.compile(r"\([^()]*[^():\d\s]\s*:\s*[+-]?(?:\d(?:\.\d+)?|\.\d+)\s*\)")
"""A weight that was probably meant as one: no ratio or time such as (16:9), and no year such as (2024)."""


def has_weights(prompt: str) -> bool:
    """Whether a prompt contains an explicit weight, such as `(red:1.4)`. Brackets without a number do not count."""
    return _LIKELY.search(prompt) is not None


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    """Splits a prompt into parts with their weights. Neighbours have different weights, and no part is empty.

    `(red:1.4)` has the weight 1.4, `(red)` 1.1, and `[red]` 1 / 1.1; nested weights are multiplied. A backslash makes
    the next bracket or backslash text. A bracket that is not closed weighs the rest of the prompt, and one that was not
    opened is text, as in the web UI.

    Args:
        prompt: Of any length.
    """
    parts: list[tuple[str, float]] = []
    opened: list[tuple[str, int]] = []
    position = 0

    def weigh(start: int, factor: float) -> None:
        parts[start:] = [(text, weight * factor) for text, weight in parts[start:]]

    while position < len(prompt):
        character = prompt[position]
        bracket, start = opened[-1] if opened else ("", 0)
        explicit = _EXPLICIT.match(prompt, position) if bracket == "(" else None
        if explicit is not None:
            weigh(start, float(explicit[1]))
            opened.pop()
            position = explicit.end()
            continue
        position += 1
        if character in _ENDS:
            opened.append((character, len(parts)))
        elif character == _ENDS.get(bracket):
            weigh(start, _factor(bracket))
            opened.pop()
        else:
            if character == "\\" and prompt[position : position + 1] in tuple("()[]\\"):
                character = prompt[position]
                position += 1
            parts.append((character, 1.0))
    for bracket, start in reversed(opened):
        weigh(start, _factor(bracket))
    return _merged(parts)


def _factor(bracket: str) -> float:
    return _STEP if bracket == "(" else 1 / _STEP


def _merged(parts: list[tuple[str, float]]) -> list[tuple[str, float]]:
    # Rounded, so that ([red]) has the weight 1.
    rounded = [(text, round(weight, 6)) for text, weight in parts]
    groups = itertools.groupby(rounded, key=lambda part: part[1])
    return [("".join(text for text, _ in group), weight) for weight, group in groups]
