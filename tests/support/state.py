"""State folders for tests: filled, damaged, and as a crash leaves them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from calotype_server import errors
from calotype_server.generations.records import Record
from calotype_server.generations.state.file import StateFile
from calotype_server.generations.state.folder import Lock
from calotype_server.generations.store import Store
from calotype_server.types import (
    DeliveryOptions,
    DisconnectPolicy,
    EncodedImage,
    Failed,
    Job,
    OutputOptions,
    PreviewMethod,
    PreviewOptions,
    Priority,
    Succeeded,
    Timings,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

FILE = "calotype.sqlite3"
JOB = Job("a red apple", "pears", 64, 48, 20, 7.5, 123, "DDIMScheduler")


@dataclass(frozen=True)
class Contents:
    """What a state folder was filled with."""

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


FIXTURE_IMAGE = bytes(range(256))


def fixture_records() -> list[Record]:
    """Returns the generations of the files in `tests/fixtures/state/`: two waiting, one given up, two ended."""
    delivery = DeliveryOptions("key:alice", 30.0, DisconnectPolicy.KEEP, 10.0, "request", seed_was_drawn=True)
    preview = PreviewOptions(2, 0.5, 256, 80, PreviewMethod.HEAD)
    job = Job(
        "a red apple",
        "pears",
        64,
        48,
        4,
        7.5,
        0,
        "DDIMScheduler",
        preview,
        OutputOptions("webp", 80, False),
        Priority.BATCH,
    )
    return [
        Record(f"f1c2e3a4.generation{number}", replace(job, seed=number), delivery, 1.5 + number, attempts)
        for number, attempts in enumerate([0, 1, 2, 1, 1])
    ]


def _write_fixture(folder: Path) -> None:
    """Writes a file for the current version."""
    folder.mkdir(parents=True)
    with Lock(folder) as lock:
        file = StateFile(lock.path)
        file.restore("f1c2e3a4", [])
        file.close()
    asyncio.run(_fill_fixture(folder))
    (folder / "calotype.lock").unlink()


async def _fill_fixture(folder: Path) -> None:
    records = fixture_records()
    async with opened(folder) as store:
        for record in records:
            await store.accept(record)
        image = EncodedImage("webp", 64, 48, FIXTURE_IMAGE)
        early = Succeeded(image, Timings(0.1, 0.2, 0.3, 0.4, 0.5, 1.5), finished_early=True)
        await store.end(records[3].generation_id, early, step=3, total_steps=4)
        failed = Failed(errors.OutOfMemory("The device ran out of memory."), Timings(total=1.0))
        await store.end(records[4].generation_id, failed, step=1, total_steps=4)


if __name__ == "__main__":
    _write_fixture(Path(sys.argv[1]))
