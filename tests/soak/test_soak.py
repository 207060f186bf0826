"""Sends requests that end in every possible way, on both ports and over unstable connections: `make soak`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

import calotype
from calotype.v1 import calotype_pb2 as pb
from soak.report import report, settle
from support.faults.leaks import Footprint, LeakGate
from support.grpcweb import WebChannel
from support.history import History, follow, read
from support.process import ServerProcess, free_address
from support.proxy import Link

if TYPE_CHECKING:
    from pathlib import Path

SECONDS = float(os.environ.get("SECONDS", "120"))
SEED = int(os.environ.get("SEED", "0"))
CALLERS = 12
PATIENCE = 120.0
"""Seconds after which a generation counts as stuck."""

SETTLED = 400
"""Number of requests after which caches, pools and the retained images have their final size."""

LEAST = 60
"""Number of requests of a short run, whose growth says nothing about leaks."""

VARIANTS = [
    {"prompt": "a red apple", "seed": 1, "steps": 8},
    {"prompt": "fox", "seed": 2, "steps": 12, "guidance_scale": 1.0},
    {"prompt": "banana", "seed": 3, "steps": 4, "width": 64, "height": 96},
    {"prompt": "umbrella", "seed": 4, "steps": 6, "scheduler": "EulerDiscreteScheduler"},
    {"prompt": "cookie", "seed": 5, "steps": 10, "scheduler": "DPMSolverMultistepScheduler"},
    {
        "prompt": "alien",
        "seed": 6,
        "steps": 5,
        "scheduler": "EulerAncestralDiscreteScheduler",
        "negative_prompt": "sky",
    },
    {"prompt": "strawberry", "seed": 7, "steps": 3, "width": 96, "height": 64, "guidance_scale": 5.0},
    {"prompt": "broken heart", "seed": 8, "steps": 7, "scheduler": "HeunDiscreteScheduler"},
]


@dataclass(frozen=True)
class Place:
    """Addresses and clients of the server, and the history of the run."""

    history: History
    client: calotype.AsyncClient
    web_address: str
    link: str
    """Address of the native port over an unstable connection."""


def recipe_of(variant: dict) -> str:
    """Returns everything that determines the image."""
    return repr(sorted((name, value) for name, value in variant.items() if name != "timeout"))


async def generate(place: Place, variant: dict, *, client: calotype.AsyncClient | None = None, **options) -> None:
    """Generates an image and records what happens; options of `support.history.follow`."""
    generation = (client or place.client).generate(**variant)
    await follow(place.history, generation, recipe=recipe_of(variant), **options)


async def complete(place: Place, variant: dict, _: random.Random) -> None:
    """Reads the stream to its end."""
    await generate(place, variant)


async def stall(place: Place, variant: dict, chance: random.Random) -> None:
    """Reads the stream slowly."""
    await generate(place, variant, on_message=lambda _: asyncio.sleep(chance.uniform(0, 0.3)))


async def cancel(place: Place, variant: dict, chance: random.Random) -> None:
    """Cancels by id after a random step, or while queued."""
    step = chance.randrange(variant["steps"])

    async def cancel_at_step(progress: calotype.Progress) -> None:
        if progress.step >= step:
            await place.client.cancel(progress.generation_id)

    # A cancel that arrives too late leaves a finished image, which is correct too.
    with contextlib.suppress(calotype.Cancelled):
        await generate(place, variant, on_message=cancel_at_step)


async def leave(place: Place, variant: dict, chance: random.Random) -> None:
    """Leaves the loop after a random step."""
    await generate(place, variant, stop_at=chance.randrange(variant["steps"]))


async def vanish(place: Place, variant: dict, chance: random.Random) -> None:
    """Closes the whole connection during the stream."""
    async with calotype.AsyncClient(place.client.address) as own:
        await generate(place, variant, client=own, stop_at=chance.randrange(variant["steps"]))


async def hurry(place: Place, variant: dict, chance: random.Random) -> None:
    """Sets a deadline that may pass."""
    with contextlib.suppress(calotype.DeadlineExceeded):
        await generate(place, {**variant, "timeout": chance.uniform(0.05, 2.0)})


async def blunder(place: Place, variant: dict, _: random.Random) -> None:
    """Sends an invalid request."""
    with pytest.raises(calotype.InvalidRequest):
        await place.client.generate(**{**variant, "width": 7, "steps": 0}).result()


async def lose(place: Place, variant: dict, _: random.Random) -> None:
    """Uses an unstable connection and a client that reconnects."""
    async with calotype.AsyncClient(place.link, retries=1000) as own:
        while True:
            try:
                return await generate(place, variant, client=own)
            except calotype.Unavailable as error:
                # A client reports a failed first contact immediately.
                assert not error.reason, error


async def browse(place: Place, variant: dict, chance: random.Random) -> None:
    """Reads on the web port, to the end or to a random step."""
    names = {"steps": "step_count", "width": "width_px", "height": "height_px"}
    request = pb.GenerateRequest(**{names.get(name, name): value for name, value in variant.items()})
    step = chance.choice((None, chance.randrange(variant["steps"])))
    with contextlib.closing(WebChannel(place.web_address)) as channel:
        log = place.history.reader(recipe=recipe_of(variant))
        await read(log, channel.stub().Generate(request), stop_at=step)
        assert log.outcome or step is not None


FATES = {complete: 5, stall: 2, cancel: 3, leave: 2, vanish: 2, hurry: 1, blunder: 1, lose: 3, browse: 5}


@pytest.mark.timeout(7200)
async def test_mixed_load_leaves_nothing_stuck_wrong_or_leaked(tmp_path: Path) -> None:
    """The whole history keeps the invariants, every slot returns, and memory, threads and files do not grow."""
    chance, history, gate = random.Random(SEED), History(), LeakGate(SETTLED)
    loop, metrics_address = asyncio.get_running_loop(), free_address()
    options = ["--deterministic", "--log-format", "json", "--metrics-address", metrics_address]
    options += ["--other-sizes", "draw", "--max-queue", "64", "--max-queue-per-caller", "64", "--retain-count", "64"]
    with ServerProcess(*options, "--state", str(tmp_path / "state")) as server:
        async with calotype.AsyncClient(server.address) as client, Link(server.address) as link:
            place = Place(history, client, server.web_address, link.address)
            for variant in VARIANTS:
                await complete(place, variant, chance)
            model = await client.model()
            assert model.max_batch_rows > 1, model.unbatched_reason
            until = loop.time() + SECONDS
            requests = 0

            async def caller() -> None:
                nonlocal requests
                while loop.time() < until or requests < LEAST:
                    fate = chance.choices(list(FATES), list(FATES.values()))[0]
                    async with asyncio.timeout(PATIENCE):
                        await fate(place, chance.choice(VARIANTS), chance)
                    history.tried[fate.__name__] += 1
                    requests += 1

            async def trouble() -> None:
                while True:
                    await asyncio.sleep(chance.uniform(0.1, 2))
                    link.cut()

            async def watch() -> None:
                while True:
                    gate.sample(requests, Footprint.of(server.process.pid))
                    await asyncio.sleep(0.5)

            background = [asyncio.create_task(trouble()), asyncio.create_task(watch())]
            async with asyncio.TaskGroup() as callers:
                for _ in range(CALLERS):
                    callers.create_task(caller())
            for task in background:
                task.cancel()
            # Every slot is free again: the maximum number of generations runs at the same time.
            async with asyncio.timeout(PATIENCE):
                await asyncio.gather(*(complete(place, VARIANTS[0], chance) for _ in range(model.max_active)))
            await settle(history, metrics_address, PATIENCE)
            history.listed([each async for each in client.generations()])
        history.tried["cut connections"] = link.cuts
        server.terminate()
        history.stopped(await asyncio.to_thread(server.process.wait, PATIENCE))
        server.join_log()
    history.log(server.log)
    await history.store(tmp_path / "state")
    found = report(history, f"mixed load, {requests} requests in {SECONDS:.0f} s, seed {SEED}; {gate.report()}")
    assert found == []
    assert link.cuts
    assert gate.leaks() == []
