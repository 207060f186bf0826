"""Turns between two steps of a generation."""

from __future__ import annotations

import pytest

from calotype_server.generations.estimates import Turns


@pytest.mark.parametrize(("progressing", "expected"), [(1, 8), (2, 4), (3, 3), (8, 1), (0, 1)])
def test_steps_of_others_are_turns(progressing: int, expected: int) -> None:
    """Between two steps of a generation, seven others made a step, with so many in each turn."""
    turns = Turns(progressing)
    generations = [turns.join() for _ in range(8)]
    for generation in generations:
        generation.begin()
    generations[0].note_step()
    for generation in generations[1:]:
        generation.note_step()
    assert generations[0].note_step() == expected


def test_steps_before_the_start_do_not_count() -> None:
    """The first turn begins when denoising starts, not when the prompt is encoded."""
    turns = Turns(1)
    running, new = turns.join(), turns.join()
    for _ in range(5):
        running.note_step()
    new.begin()
    assert new.note_step() == 1
