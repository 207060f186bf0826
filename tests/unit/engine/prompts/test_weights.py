"""The syntax of weighted prompts."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calotype_server.engine.prompts.weights import has_weights, parse_weights

SYNTAX, ESCAPED = re.compile(r"[][()\\]"), r"\\\g<0>"
TEXT = st.text("ab ,:(.)[1]\\", max_size=20)


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("", []),
        ("a red apple", [("a red apple", 1.0)]),
        ("a (red) apple", [("a ", 1.0), ("red", 1.1), (" apple", 1.0)]),
        ("a ((red)) apple", [("a ", 1.0), ("red", 1.21), (" apple", 1.0)]),
        ("a [red] apple", [("a ", 1.0), ("red", 0.909091), (" apple", 1.0)]),
        ("a (red:1.4) apple", [("a ", 1.0), ("red", 1.4), (" apple", 1.0)]),
        ("(red: 0.5 )", [("red", 0.5)]),
        ("(red:.5)", [("red", 0.5)]),
        ("(red:-1)", [("red", -1.0)]),
        ("((red:2) apple)", [("red", 2.2), (" apple", 1.1)]),
        ("(a [red:2) apple", [("a ", 1.1), ("red:2) apple", 1.0)]),
        (r"a \(red\) apple", [("a (red) apple", 1.0)]),
        (r"(a \(red\):2)", [("a (red)", 2.0)]),
        (r"back\\slash\n", [(r"back\slash\n", 1.0)]),
        ("(red apple", [("red apple", 1.1)]),
        ("red) apple", [("red) apple", 1.0)]),
        ("(red:1.4", [("red:1.4", 1.1)]),
        ("(red:1.4.2)", [("red:1.4.2", 1.1)]),
        ("at 12:30", [("at 12:30", 1.0)]),
        ("(a:1.0) b ([c])", [("a b c", 1.0)]),
        ("()", []),
    ],
)
def test_weights_are_read(prompt: str, parts: list[tuple[str, float]]) -> None:
    """Brackets weigh their content, numbers replace the usual weights, and a backslash makes a bracket text."""
    assert parse_weights(prompt) == parts


@given(st.lists(st.tuples(TEXT.filter(bool), st.integers(-300, 300).map(lambda percent: percent / 100)), max_size=5))
def test_escaped_text_with_a_weight_is_read_as_it_is(parts: list[tuple[str, float]]) -> None:
    """Any text can get any weight: escaped, in round brackets and with a number."""
    prompt = "".join(f"({SYNTAX.sub(ESCAPED, text)}:{weight})" for text, weight in parts)
    read = parse_weights(prompt)
    assert [(text, weight) for part, weight in read for text in part] == [
        (character, weight) for text, weight in parts for character in text
    ]
    assert all(first[1] != second[1] for first, second in itertools.pairwise(read))


@given(TEXT)
def test_any_text_can_be_read(prompt: str) -> None:
    """Unbalanced brackets and odd numbers raise nothing, and no character that is not syntax is lost."""
    read = parse_weights(prompt)
    letters = [character for text, _ in read for character in text if character in "ab ,"]
    assert [character for character in prompt if character in "ab,"] == [each for each in letters if each != " "]
    assert all(text for text, _ in read)


@pytest.mark.parametrize(
    ("prompt", "likely"),
    [
        ("a (red:1.4) apple", True),
        ("(a red apple:0.8), fruit", True),
        ("(1girl:1.2)", True),
        ("(red: 2)", True),
        ("a (red) apple", False),
        ("a :) smiley (:", False),
        ("(2024)", False),
        ("a screen (16:9)", False),
        ("(at 12:30)", False),
        ("(Psalm: 23)", False),
        ("ratio: 1.4", False),
        ("[red:1.4]", False),
        (":1.4)", False),
    ],
)
def test_only_explicit_weights_are_suspicious(prompt: str, likely: bool) -> None:
    """A number after a word, in round brackets, is a weight; smileys, years, ratios and times are not."""
    assert has_weights(prompt) is likely
