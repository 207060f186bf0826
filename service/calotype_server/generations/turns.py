"""Turns: how often the engine computed steps while a generation waited for its own next step."""

from __future__ import annotations

import math
import threading

__all__ = ["Turn", "Turns"]


class Turns:
    """Counts the steps of all generations. Thread-safe.

    If only some running generations progress at once, the time between two steps of one includes turns of others.
    Divided by the turns in it, it is the duration of a step.

    Args:
        progressing: Running generations that progress at once; 0 for all.
    """

    def __init__(self, progressing: int) -> None:
        self._progressing = progressing
        self._lock = threading.Lock()
        self._steps = 0

    def join(self) -> Turn:
        """Returns the view of one generation."""
        return Turn(self)

    @property
    def steps(self) -> int:
        """Steps of all generations so far."""
        return self._steps

    def note_step(self) -> int:
        """Counts a step of any generation, and returns the count."""
        with self._lock:
            self._steps += 1
            return self._steps

    def of(self, steps: int) -> int:
        """Returns in how many turns the engine makes so many steps, at least 1."""
        return max(1, math.ceil(steps / self._progressing)) if self._progressing else 1


class Turn:
    """Counts from step to step of one generation."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._before = turns.steps

    def begin(self) -> None:
        """Records that denoising starts."""
        self._before = self._turns.steps

    def note_step(self) -> int:
        """Records a step, and returns the turns since the one before, its own included."""
        before, self._before = self._before, self._turns.note_step()
        return self._turns.of(self._before - before)
