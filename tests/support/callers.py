"""Callers whose servers fail, and the messages that they received."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

    import calotype

STEPS = 4


def tag(generation_id: str) -> str:
    """Returns the tag of the server that has the generation."""
    return generation_id.rpartition(".")[0]


class Job:
    """One caller, and the messages that it received."""

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt
        self.seen: list[calotype.Progress] = []

    async def run(self, client: calotype.AsyncClient, step: asyncio.Event, steps: int = STEPS) -> bytes:
        """Generates an image and returns it. Sets `step` after each message."""
        generation = client.generate(self.prompt, seed=5, steps=steps)
        async for progress in generation:
            self.seen.append(progress)
            step.set()
        return (await generation.result()).data

    @property
    def homes(self) -> list[str]:
        """Tags of the servers that it used, in order."""
        return [home for home, _ in itertools.groupby(tag(progress.generation_id) for progress in self.seen)]

    def is_halfway(self, home: str) -> bool:
        """Whether its generation on that server has done some but not all steps."""
        last = self.seen[-1] if self.seen else None
        return last is not None and tag(last.generation_id) == home and 1 <= last.step < last.total_steps


async def until(condition, step: asyncio.Event) -> None:
    """Waits until a condition is true, and checks it after each message."""
    while not condition():
        step.clear()
        await step.wait()
