"""State folders for tests: filled, damaged, and as a crash leaves them."""

from __future__ import annotations

import contextlib
import random
import shutil
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from calotype_server import errors
from calotype_server.generations.records import Record
from calotype_server.generations.store import Store
from calotype_server.types import (
    DeliveryOptions,
    EncodedImage,
    Failed,
    Job,
    Succeeded,
    Timings,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

FILE = "calotype.sqlite3"
JOB = Job("a red apple", "pears", 64, 48, 20, 7.5, 123, "DDIMScheduler")


@dataclass(frozen=True)
class Contents:
    """Everything that a state folder was filled with."""

    records: dict[str, Record]
    """Every generation by id, without its end."""
    images: dict[str, bytes]
    """The final image of each generation that succeeded."""
    failed: frozenset[str]
    """The generations that failed with `OutOfMemory`."""


@contextlib.asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[Store]:
    """Opens a store for the duration of the block."""
    store = await Store.open(folder)
    try:
        yield store
    finally:
        await store.close()


async def fill(folder: Path, count: int, image_bytes: int = 20_000) -> Contents:
    """Stores `count` generations: by turns without an end, succeeded and failed; those without an end ran once."""
    draw = random.Random(count)
    contents = Contents({}, {}, frozenset())
    failed = set()
    async with opened(folder) as store:
        for number in range(count):
            generation_id = f"{store.replica}.{draw.randbytes(8).hex()}"
            job = replace(JOB, prompt=f"prompt {number} " + "x" * draw.randrange(300), seed=number)
            record = Record(generation_id, job, DeliveryOptions("key:alice", request_id=f"r{number}"), float(number))
            contents.records[generation_id] = record
            await store.accept(record)
            await store.note_attempts(generation_id, 1)
            if number % 3 == 1:
                contents.images[generation_id] = draw.randbytes(image_bytes)
                image = EncodedImage("png", job.width, job.height, contents.images[generation_id])
                await store.end(generation_id, Succeeded(image, Timings(total=1.0)), step=20, total_steps=20)
            elif number % 3 == 2:
                failed.add(generation_id)
                error = errors.OutOfMemory("The device ran out of memory.")
                await store.end(generation_id, Failed(error, Timings()), step=2, total_steps=20)
    return replace(contents, failed=frozenset(failed))


async def wrong(store: Store, contents: Contents) -> list[str]:
    """Returns everything that a loaded store serves and that is neither right nor a `DataLoss`."""
    found = []
    records = await store.load()
    for record in records:
        stored = contents.records.get(record.generation_id)
        if stored is None or replace(record, end=None, attempts=0) != stored or record.attempts != 1:
            found.append(f"record {record.generation_id}")
            continue
        if record.end is not None and isinstance(record.end.error, errors.DataLoss):
            continue
        if (record.end is None) != (record.generation_id not in {*contents.images, *contents.failed}):
            found.append(f"end of {record.generation_id}")
        if record.end is not None and (record.end.error is not None) != (record.generation_id in contents.failed):
            found.append(f"result of {record.generation_id}")
        if record.end is not None and record.end.image is not None:
            with contextlib.suppress(errors.DataLoss):
                if await store.image(record.generation_id) != contents.images.get(record.generation_id):
                    found.append(f"image of {record.generation_id}")
    if len({record.generation_id for record in records}) != len(records):
        found.append("duplicates")
    return found


def crashed(folder: Path, copy: Path) -> Path:
    """Copies the folder of a running server to `copy`, as it would be found if the process were killed now."""
    return shutil.copytree(folder, copy)
