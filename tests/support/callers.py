"""Callers whom servers fail, and what they were shown."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

    import calotype

STEPS = 4


def tag(generation_id: str) -> str:
    """Of the server that has the generation."""
    return generation_id.rpartition(".")[0]


class Job:
    """One caller, and what it was shown."""

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt
        self.seen: list[calotype.Progress] = []

    async def run(self, client: calotype.AsyncClient, step: asyncio.Event, steps: int = STEPS) -> bytes:
        """Follows a generation to its picture; sets `step` with each message."""
        generation = client.generate(self.prompt, seed=5, steps=steps)
        async for progress in generation:
            self.seen.append(progress)
            step.set()
        return (await generation.result()).data

    @property
    def homes(self) -> list[str]:
        """Tags of the servers that it was with, in order."""
        return [home for home, _ in itertools.groupby(tag(progress.generation_id) for progress in self.seen)]

    def is_halfway(self, home: str) -> bool:
        """Whether it is in the midst of its steps on that server."""
        last = self.seen[-1] if self.seen else None
        return last is not None and tag(last.generation_id) == home and 1 <= last.step < last.total_steps


async def until(condition, step: asyncio.Event) -> None:
    """Waits for something that messages bring about."""
    while not condition():
        step.clear()
        await step.wait()
