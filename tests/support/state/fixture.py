"""Writes the state files in `tests/fixtures/state/`: `python -m support.state.fixture FOLDER`."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from pathlib import Path

from calotype_server import errors
from calotype_server.generations.records import Record
from calotype_server.generations.state.file import StateFile
from calotype_server.generations.state.folder import Lock
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
from support.state.folders import opened

FIXTURE_IMAGE = bytes(range(256))


def fixture_records() -> list[Record]:
    """Returns the generations of the files in `tests/fixtures/state/`: two waiting, one given up, two ended."""
    delivery = DeliveryOptions("key:alice", 30.0, DisconnectPolicy.KEEP, 10.0, seed_was_drawn=True)
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
        Record(
            f"f1c2e3a4.generation{number}",
            replace(job, seed=number),
            replace(delivery, request_id=f"request{number}"),
            1.5 + number,
            attempts,
        )
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
