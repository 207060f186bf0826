"""Damaged state: whatever is served is right or DATA_LOSS, everything else is served, and the server starts."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import sqlite3
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from calotype_server import errors
from calotype_server.auth.access import Caller
from calotype_server.generations.records import Record
from calotype_server.generations.state.pages import PAGE_BYTES
from calotype_server.types import DeliveryOptions, EncodedImage, Failed, Succeeded, Timings
from support.engine.fake_engine import FakeEngine
from support.runtime import running_runtime
from support.state.folders import FILE, JOB, Contents, crashed, fill, opened, wrong

if TYPE_CHECKING:
    from collections.abc import Callable

    Damage = Callable[[bytearray, int, int], None]


class Healthy:
    """The bytes of an intact file, and its contents. Reports of hypothesis show neither: they are long."""

    def __init__(self, data: bytes, contents: Contents) -> None:
        self.data = data
        self.contents = contents


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Healthy:
    """A file with 15 generations."""
    folder = tmp_path_factory.mktemp("healthy")
    contents = asyncio.run(fill(folder, 15))
    return Healthy((folder / FILE).read_bytes(), contents)


def flip_bits(data: bytearray, seed: int, count: int) -> None:
    """Flips bits at random places."""
    draw = random.Random(seed)
    for _ in range(count):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def flip_header(data: bytearray, seed: int, count: int) -> None:
    """Flips bits in the header, in the schema and in the first pages, which hold the structure."""
    draw = random.Random(seed)
    for _ in range(count):
        data[draw.randrange(draw.choice([100, 600, 3 * PAGE_BYTES]))] ^= 1 << draw.randrange(8)


def zero_page(data: bytearray, seed: int, count: int) -> None:
    """Overwrites pages with zeros."""
    for page in random.Random(seed).choices(range(len(data) // PAGE_BYTES), k=count):
        data[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = bytes(PAGE_BYTES)


def cut_off(data: bytearray, seed: int, count: int) -> None:
    """Cuts the end off; at least the header stays."""
    del data[random.Random(seed + count).randrange(100, len(data)) :]


def check_damage(healthy: Healthy, damage: Damage, seed: int, count: int) -> None:
    """Damages a copy of the file, and checks that the store opens, serves nothing wrong and accepts new work."""
    data, contents = bytearray(healthy.data), healthy.contents
    damage(data, seed, count)

    async def scenario(folder: Path) -> None:
        (folder / FILE).write_bytes(data)
        async with opened(folder) as store:
            assert await wrong(store, contents) == []
            await store.accept(Record("new.one", JOB, DeliveryOptions(), 1.0))
            assert "new.one" in {record.generation_id for record in await store.load()}

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(scenario(Path(folder)))


DAMAGES = [flip_bits, flip_header, zero_page, cut_off]
seeds = st.integers(0, 2**32)
counts = st.sampled_from([1, 1, 1, 8])


@pytest.mark.parametrize("damage", DAMAGES)
@settings(max_examples=20, deadline=None)
@given(seed=seeds, count=counts)
def test_whatever_is_served_is_right_or_data_loss(healthy, damage: Damage, seed: int, count: int) -> None:
    """For any damage, the store opens, serves nothing wrong, runs no ended generation again, and accepts new work."""
    check_damage(healthy, damage, seed, count)


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
@settings(max_examples=100, deadline=None)
@given(seed=seeds, count=counts)
def test_hundreds_of_damaged_files(healthy, damage: Damage, seed: int, count: int) -> None:
    """The same as above, many times."""
    check_damage(healthy, damage, seed, count)


def test_a_damaged_table_that_is_not_text_is_repaired(healthy: Healthy) -> None:
    """The description of a table contains a byte that is not UTF-8, which an error message of SQLite quotes."""

    def garble(data: bytearray, *_: int) -> None:
        data[data.index(b"TABLE generations")] = 0xCE

    check_damage(healthy, garble, 0, 0)


@pytest.mark.parametrize("version", [0, 1, 3, 200, 2**31 - 1])
def test_a_damaged_version_is_repaired(healthy: Healthy, version: int) -> None:
    """Only an application id that confirms it makes a version a foreign one."""

    def garble(data: bytearray, *_: int) -> None:
        data[60:64] = version.to_bytes(4)
        data[68:72] = b"cax\2"

    check_damage(healthy, garble, 0, 0)


def set_aside(folder: Path) -> dict[str, bytes]:
    """Returns the damaged files that a repair has kept."""
    return {str(file): file.read_bytes() for file in folder.glob("*.damaged-*")}


def change(folder: Path, *statements: str) -> None:
    """Executes SQL in the file of a closed store."""
    with contextlib.closing(sqlite3.connect(folder / FILE)) as database, database:
        for statement in statements:
            database.execute(statement)


@pytest.mark.parametrize("column", ["record", "ended", "image", "attempts"])
async def test_values_of_another_generation_are_recognised(tmp_path: Path, column: str) -> None:
    """Two swapped values, each with a correct checksum, are not served as those of the wrong generation."""
    contents = await fill(tmp_path, 6)
    change(
        tmp_path,
        "CREATE TEMP TABLE old AS SELECT * FROM generations",
        f"UPDATE generations SET {column} = (SELECT {column} FROM old WHERE ordinal = 5) WHERE ordinal = 2",
        f"UPDATE generations SET {column} = (SELECT {column} FROM old WHERE ordinal = 2) WHERE ordinal = 5",
    )
    async with opened(tmp_path) as store:
        with capture_logs() as logs:
            assert await wrong(store, contents) == []
        if column == "image":
            with pytest.raises(errors.DataLoss):
                await store.image(list(contents.records)[1])
        else:
            assert len([line for line in logs if line["log_level"] == "error"]) == 2


async def test_callers_of_a_damaged_generation_get_data_loss(tmp_path: Path) -> None:
    """A damaged record, end or image is DATA_LOSS for the callers that ask for it; the others get their images."""
    contents = await fill(tmp_path, 12)
    by_record, by_end, by_image, intact = contents.images
    for column, generation_id in (("record", by_record), ("ended", by_end), ("image", by_image)):
        change(tmp_path, f"UPDATE generations SET {column} = x'00' WHERE generation_id = '{generation_id}'")
    engine, alice = FakeEngine(), Caller("key:alice")
    engine.hold()
    async with opened(tmp_path) as store, running_runtime(engine, store=store) as runtime:
        generations = runtime.generations
        with pytest.raises(errors.DataLoss):
            generations.find(by_record, alice)
        for damaged in (by_end, by_image):
            async with generations.follow(generations.find(damaged, alice)) as reader:
                update, _ = await anext(reader)
            assert isinstance(update.state.end, Failed)
            assert isinstance(update.state.end.error, errors.DataLoss)
        end = generations.find(intact, alice).events.state.end
        assert isinstance(end, Succeeded)
        assert end.image.data == contents.images[intact]


async def test_a_damaged_page_does_not_prevent_the_start(tmp_path: Path) -> None:
    """The readable generations move to a new file, the log says so, and the damaged file is kept unchanged."""
    contents = await fill(tmp_path, 9)
    damaged = bytearray((tmp_path / FILE).read_bytes())
    damaged[: 2 * PAGE_BYTES] = bytes(2 * PAGE_BYTES)  # the header, the schema and the root of the tree
    (tmp_path / FILE).write_bytes(damaged)
    with capture_logs() as logs:
        async with opened(tmp_path) as store:
            assert await wrong(store, contents) == []
            assert {record.generation_id for record in await store.load()} == set(contents.records)
            assert all(generation_id.startswith(store.replica) for generation_id in contents.records)
    [repaired] = [line for line in logs if line.get("kept")]
    assert (repaired["kept"], repaired["damaged"]) == (9, [])
    assert set_aside(tmp_path) == {repaired["set_aside"]: damaged}
    with capture_logs() as logs:
        async with opened(tmp_path):
            assert logs == []


async def test_a_repair_includes_the_write_ahead_log(tmp_path: Path) -> None:
    """After a crash, changes that are not yet in the damaged file are salvaged too."""
    ids = list((await fill(tmp_path / "state", 3)).records)
    async with opened(tmp_path / "state") as store:
        await store.accept(Record(f"{store.replica}.late", JOB, DeliveryOptions(), 1.0))
        ids.append(f"{store.replica}.late")
        copy = crashed(tmp_path / "state", tmp_path / "copy")
    data = (copy / FILE).read_bytes()
    assert b"late" not in data
    (copy / FILE).write_bytes(b"\0" * 100 + data[100:])
    async with opened(copy) as store:
        assert [record.generation_id for record in await store.load()] == ids


async def test_a_repair_does_not_bring_removed_generations_back(tmp_path: Path) -> None:
    """Removed prompts and images are not in the file any more."""
    contents = await fill(tmp_path, 30, image_bytes=300)
    kept = list(contents.records)[::7]
    async with opened(tmp_path) as store:
        await store.forget(set(contents.records) - set(kept))
    data = (tmp_path / FILE).read_bytes()
    assert [name for name, record in contents.records.items() if record.job.prompt.encode() in data] == kept
    (tmp_path / FILE).write_bytes(b"\0" * 100 + data[100:])
    async with opened(tmp_path) as store:
        assert [record.generation_id for record in await store.load()] == kept


async def test_two_copies_of_a_page_are_one_generation(tmp_path: Path) -> None:
    """If a repair finds a generation with and without its end, it keeps the end."""
    async with opened(tmp_path / "state") as store:
        record = Record(f"{store.replica}.a", JOB, DeliveryOptions(), 1.0)
        await store.accept(record)
        copy = crashed(tmp_path / "state", tmp_path / "before")
        await store.end(
            record.generation_id, Succeeded(EncodedImage("png", 64, 48, b"image"), Timings()), step=1, total_steps=1
        )
    async with opened(copy):
        pass
    pages = (copy / FILE).read_bytes()
    with (tmp_path / "state" / FILE).open("r+b") as file:
        file.write(b"\0" * 100)
        file.seek(0, 2)
        file.write(pages[PAGE_BYTES:])
    async with opened(tmp_path / "state") as store:
        [kept] = await store.load()
        assert replace(kept, end=None) == record
        assert await store.image(record.generation_id) == b"image"


async def test_a_disk_without_room_for_the_new_file_is_an_error_with_advice(tmp_path: Path, monkeypatch) -> None:
    """If the repair fails, the damaged file stays where it is."""
    await fill(tmp_path, 3)
    damaged = b"\0" * 100 + (tmp_path / FILE).read_bytes()[100:]
    (tmp_path / FILE).write_bytes(damaged)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.link", full)
    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(errors.StateUnusable, match=r"No space left on device.*with free space"):
        async with opened(tmp_path):
            pass
    assert (tmp_path / FILE).read_bytes() == damaged
