"""Sends requests that end in every possible way, on both ports and over unstable connections: `make soak`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

import calotype
from calotype.v1 import calotype_pb2 as pb
from support.grpcweb import WebChannel
from support.process import ServerProcess
from support.proxy import Link

SECONDS = float(os.environ.get("SECONDS", "120"))
CALLERS = 12
PATIENCE = 120.0
"""Seconds after which a generation counts as stuck."""

SETTLED = 60
"""Number of requests after which caches and pools have their final size."""

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
class Footprint:
    """Threads, open files and memory of a process."""

    threads: int
    files: int
    resident_kib: int

    @staticmethod
    def of(pid: int) -> Footprint:
        """Reads the values from the kernel."""
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return Footprint(
            int(status["Threads"]), len(list(Path(f"/proc/{pid}/fd").iterdir())), int(status["VmRSS"].split()[0])
        )


@dataclass(frozen=True)
class Place:
    """Addresses and clients of the server."""

    client: calotype.AsyncClient
    web_address: str
    link: str
    """Address of the native port over an unstable connection."""


async def complete(place: Place, variant: dict, _: random.Random) -> bytes:
    """Reads the stream to its end."""
    return (await place.client.generate(**variant).result()).data


async def stall(place: Place, variant: dict, chance: random.Random) -> bytes:
    """Reads the stream slowly."""
    generation = place.client.generate(**variant)
    async for _ in generation:
        await asyncio.sleep(chance.uniform(0, 0.3))
    return (await generation.result()).data


async def cancel(place: Place, variant: dict, chance: random.Random) -> None:
    """Cancels by id after a random step, or while queued."""
    generation, step = place.client.generate(**variant), chance.randrange(variant["steps"])
    with pytest.raises(calotype.Cancelled):
        async for progress in generation:
            if progress.step >= step:
                await place.client.cancel(progress.generation_id)
        # A cancel that arrives too late leaves a finished image, which is correct too.
        raise calotype.Cancelled("")


async def leave(place: Place, variant: dict, chance: random.Random) -> None:
    """Leaves the loop after a random step."""
    step = chance.randrange(variant["steps"])
    async for progress in place.client.generate(**variant):
        if progress.step >= step:
            break


async def vanish(place: Place, variant: dict, chance: random.Random) -> None:
    """Closes the whole connection during the stream."""
    async with calotype.AsyncClient(place.client.address) as own:
        step = chance.randrange(variant["steps"])
        async for progress in own.generate(**variant):
            if progress.step >= step:
                return


async def hurry(place: Place, variant: dict, chance: random.Random) -> bytes | None:
    """Sets a deadline that may pass."""
    try:
        return (await place.client.generate(**variant, timeout=chance.uniform(0.05, 2.0)).result()).data
    except calotype.DeadlineExceeded:
        return None


async def blunder(place: Place, variant: dict, _: random.Random) -> None:
    """Sends an invalid request."""
    with pytest.raises(calotype.InvalidRequest):
        await place.client.generate(**{**variant, "width": 7, "steps": 0}).result()


async def lose(place: Place, variant: dict, _: random.Random) -> bytes:
    """Uses an unstable connection and a client that reconnects."""
    async with calotype.AsyncClient(place.link, retries=1000) as own:
        while True:
            try:
                return (await own.generate(**variant).result()).data
            except calotype.Unavailable as error:
                # A client reports a failed first contact immediately.
                assert not error.reason, error


async def browse(place: Place, variant: dict, chance: random.Random) -> bytes | None:
    """Reads on the web port, to the end or to a random step."""
    names = {"steps": "step_count", "width": "width_px", "height": "height_px"}
    request = pb.GenerateRequest(**{names.get(name, name): value for name, value in variant.items()})
    step, image = chance.choice((variant["steps"], chance.randrange(variant["steps"]))), b""
    with contextlib.closing(WebChannel(place.web_address)) as channel:
        async for message in channel.stub().Generate(request):
            if message.phase == pb.PHASE_SUCCEEDED:
                image += message.image
            elif message.step >= step < variant["steps"]:
                return None
    return image


FATES = {complete: 5, stall: 2, cancel: 3, leave: 2, vanish: 2, hurry: 1, blunder: 1, lose: 3, browse: 5}


@pytest.mark.timeout(7200)
async def test_mixed_load_leaves_nothing_stuck_wrong_or_leaked() -> None:
    """Every image equals an undisturbed one bit for bit; threads, files, slots and memory do not grow."""
    chance = random.Random(int(os.environ.get("SEED", "0")))
    loop = asyncio.get_running_loop()
    with ServerProcess("--deterministic", "--log-level", "error", "--max-queue", "64") as server:
        async with calotype.AsyncClient(server.address) as client, Link(server.address) as link:
            place = Place(client, server.web_address, link.address)
            alone = [await complete(place, variant, chance) for variant in VARIANTS]
            model = await client.model()
            assert model.max_batch_rows > 1, model.unbatched_reason
            fates, wrong, until = Counter(), 0, loop.time() + SECONDS
            settled: Footprint | None = None

            async def caller() -> None:
                nonlocal wrong, settled
                while loop.time() < until or settled is None:
                    fate = chance.choices(list(FATES), list(FATES.values()))[0]
                    index = chance.randrange(len(VARIANTS))
                    async with asyncio.timeout(PATIENCE):
                        data = await fate(place, VARIANTS[index], chance)
                    fates[fate.__name__] += 1
                    wrong += data is not None and data != alone[index]
                    if fates.total() == SETTLED:
                        settled = Footprint.of(server.process.pid)

            async def trouble() -> None:
                while True:
                    await asyncio.sleep(chance.uniform(0.1, 2))
                    link.cut()

            cutting = asyncio.create_task(trouble())
            async with asyncio.TaskGroup() as callers:
                for _ in range(CALLERS):
                    callers.create_task(caller())
            cutting.cancel()
            # Every slot is free again: the maximum number of generations runs at the same time.
            async with asyncio.timeout(PATIENCE):
                again = await asyncio.gather(*(complete(place, VARIANTS[0], chance) for _ in range(model.max_active)))
            after = Footprint.of(server.process.pid)
            print(f"\n{fates.total()} requests in {SECONDS:.0f} s: {dict(fates)}; wrong {wrong}; {link.cuts} links cut")
            print(f"start {settled}\nend   {after}")
            assert wrong == 0
            assert link.cuts
            assert set(again) == {alone[0]}
            assert after.threads <= settled.threads
            assert after.files <= settled.files + CALLERS
            assert after.resident_kib <= 1.1 * settled.resident_kib
        assert server.process.poll() is None
