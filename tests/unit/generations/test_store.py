"""Acknowledged changes survive any crash, and unusable state folders are reported with advice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import resource
import sqlite3
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from calotype_server import errors
from calotype_server.failpoints import injected
from calotype_server.generations.records import ImageFacts, Record
from calotype_server.generations.state.seals import seal, unseal
from calotype_server.generations.store import Store
from calotype_server.types import (
    DeliveryOptions,
    DisconnectPolicy,
    EncodedImage,
    Failed,
    Job,
    Lora,
    OutputOptions,
    Phase,
    PreviewMethod,
    PreviewOptions,
    Priority,
    Speed,
    Succeeded,
    Timings,
)

JOB = Job("a red apple", "pears", 64, 48, 20, 7.5, 123, "DDIMScheduler")
IMAGE = EncodedImage("png", 64, 48, b"an image")
FILE = "calotype.sqlite3"

texts = st.text(max_size=20)
seconds = st.floats(0, 1e9)
numbers = st.integers(0, 2**53 - 1)
edges = st.integers(0, 2**13)
optional_seconds = st.none() | seconds
jobs = st.builds(
    Job,
    prompt=texts,
    negative_prompt=st.none() | texts,
    width=edges,
    height=edges,
    step_count=numbers,
    guidance_scale=optional_seconds,
    seed=numbers,
    scheduler=texts,
    preview=st.builds(PreviewOptions, numbers, seconds, numbers, numbers, st.sampled_from(PreviewMethod)),
    output=st.builds(OutputOptions, st.sampled_from(["jpeg", "png", "webp"]), numbers, st.booleans()),
    priority=st.sampled_from(Priority),
    speed=st.sampled_from(Speed),
    loras=st.lists(st.builds(Lora, texts, st.floats(-10, 10)), max_size=2).map(tuple),
)
deliveries = st.builds(
    DeliveryOptions, texts, optional_seconds, st.sampled_from(DisconnectPolicy), seconds, texts, st.booleans()
)
timings = st.builds(Timings, *[optional_seconds] * 6, computed_steps=numbers)
images = st.builds(EncodedImage, st.sampled_from(["jpeg", "png", "webp"]), numbers, numbers, st.binary(max_size=99))
failures = st.builds(
    lambda kind, message, retry_after, metadata: kind(message, retry_after=retry_after, metadata=metadata),
    st.sampled_from([errors.Cancelled, errors.Draining, errors.OutOfMemory, errors.DeadlineTooShort]),
    texts,
    optional_seconds,
    st.dictionaries(texts, texts, max_size=2),
)
ends = st.builds(Succeeded, images, timings, st.booleans()) | st.builds(Failed, failures, timings)


@contextlib.asynccontextmanager
async def opened(folder: Path):
    """Opens a store for the duration of the block."""
    store = await Store.open(folder)
    try:
        yield store
    finally:
        await store.close()


def record(generation_id: str, **changes) -> Record:
    """Returns the record of an accepted generation."""
    return replace(Record(generation_id, JOB, DeliveryOptions("caller"), 1.5), **changes)


@settings(max_examples=50, deadline=None)
@given(jobs, deliveries, seconds, st.none() | ends, numbers)
def test_records_are_read_back_unchanged(job, deliveries, created, end, step) -> None:
    """After reopening, every field of a generation has the value that was written."""

    async def scenario(folder: Path) -> None:
        async with opened(folder) as store:
            await store.accept(Record("id", job, deliveries, created))
            if end is not None:
                await store.end("id", end, step=step, total_steps=step + 1)
        async with opened(folder) as store:
            (kept,) = await store.load()
            assert replace(kept, end=None) == Record("id", job, deliveries, created)
            assert (kept.end is None) == (end is None)
            image = getattr(end, "image", None)
            assert await store.image("id") == (image and image.data)
        if end is None:
            return
        assert (kept.end.step, kept.end.total_steps, kept.end.timings) == (step, step + 1, end.timings)
        if image is not None:
            assert kept.end.phase is Phase.SUCCEEDED
            assert kept.end.finished_early == end.finished_early
            assert kept.end.image == ImageFacts(image.format, image.width, image.height, len(image.data))
            return
        assert kept.end.image is None
        assert kept.end.phase is (Phase.CANCELLED if isinstance(end.error, errors.Cancelled) else Phase.FAILED)
        assert type(kept.end.error) is type(end.error)
        assert vars(kept.end.error) == vars(end.error)

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(scenario(Path(folder) / "new" / "folder"))


async def test_records_are_loaded_in_order_of_acceptance(tmp_path: Path) -> None:
    """The order of ends does not matter; forgotten generations and their images are deleted."""
    async with opened(tmp_path) as store:
        for name in "dbca":
            await store.accept(record(name))
        await store.end("c", Succeeded(IMAGE, Timings()), step=3, total_steps=3)
        await store.end("d", Succeeded(IMAGE, Timings()), step=3, total_steps=3)
        await store.forget(["c", "b", "unknown"])
    async with opened(tmp_path) as store:
        assert [(kept.generation_id, kept.end is None) for kept in await store.load()] == [("d", False), ("a", True)]
        assert await store.image("d") == IMAGE.data
        assert await store.image("c") is None


async def test_the_first_end_is_kept(tmp_path: Path) -> None:
    """A second end is ignored; an end without an accepted generation creates no record."""
    async with opened(tmp_path) as store:
        await store.accept(record("a"))
        await store.end("a", Failed(errors.Cancelled("gone"), Timings()), step=1, total_steps=3)
        await store.end("a", Succeeded(IMAGE, Timings()), step=3, total_steps=3)
        await store.end("b", Succeeded(IMAGE, Timings()), step=3, total_steps=3)
        (kept,) = await store.load()
        assert kept.end.phase is Phase.CANCELLED
        assert await store.image("a") is None


# Accepts and ends generations with images of up to 1 MB, and prints a line after each change.
WRITER = """
import asyncio, random, sys
from pathlib import Path
from calotype_server.generations.records import Record
from calotype_server.generations.state.seals import seal, unseal
from calotype_server.generations.store import Store
from calotype_server.types import EncodedImage, Job, Succeeded, DeliveryOptions, Timings

async def main():
    store = await Store.open(Path(sys.argv[1]))
    for number in range(int(sys.argv[2]), 1_000_000):
        job = Job("a red apple", None, 64, 48, 20, 7.5, number, "DDIMScheduler")
        await store.accept(Record(f"g{number}", job, DeliveryOptions(), number))
        print("accepted", number, flush=True)
        draw = random.Random(number)
        image = EncodedImage("png", 64, 48, draw.randbytes(draw.randrange(1_000_000)))
        await store.end(f"g{number}", Succeeded(image, Timings()), step=20, total_steps=20)
        print("ended", number, flush=True)

asyncio.run(main())
"""


def killed_writer(folder: Path, begin: int, lines: int) -> list[list[str]]:
    """Starts a writer at number `begin`, kills it after this many lines, and returns all lines that it printed."""
    command = [sys.executable, "-c", WRITER, str(folder), str(begin)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        printed = [writer.stdout.readline() for _ in range(lines)]
        writer.kill()
        printed += writer.stdout.readlines()
    return [line.split() for line in printed]


async def test_sigkill_during_a_write_loses_no_acknowledged_change(tmp_path: Path) -> None:
    """After repeated kills, the file has every acknowledged change, and at most one more that was not printed."""
    accepted, ended = set(), set()
    for lines in random.sample(range(1, 13), 4):
        for word, number in killed_writer(tmp_path, len(accepted), lines):
            (accepted if word == "accepted" else ended).add(int(number))
        async with opened(tmp_path) as store:
            kept = await store.load()
            found = {int(each.generation_id[1:]) for each in kept}
            found_ends = {each.job.seed for each in kept if each.end is not None}
            assert accepted <= found
            assert ended <= found_ends
            assert len(found - accepted) + len(found_ends - ended) <= 1
            for number in found_ends:
                expected = random.Random(number)
                assert await store.image(f"g{number}") == expected.randbytes(expected.randrange(1_000_000))
        with contextlib.closing(sqlite3.connect(tmp_path / FILE)) as database:
            assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        accepted, ended = found, found_ends


async def test_only_one_server_can_open_the_folder(tmp_path: Path) -> None:
    """A second server fails with an explanation until the first has closed the store."""
    async with opened(tmp_path):
        with pytest.raises(errors.StateUnusable, match=r"in use by another server.*its own folder"):
            await Store.open(tmp_path)
        command = [sys.executable, "-c", WRITER, str(tmp_path), "0"]
        other = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
        assert "in use by another server" in other.stderr
    async with opened(tmp_path) as store:
        assert await store.load() == []


@pytest.mark.parametrize(
    ("version", "message"), [(1, "an older Calotype that was never released"), (3, "a newer Calotype. Update")]
)
async def test_a_file_of_another_version_is_not_changed(tmp_path: Path, version: int, message: str) -> None:
    """A file of an older or newer version is rejected with advice and stays as it is."""
    with contextlib.closing(sqlite3.connect(tmp_path / FILE)) as database:
        database.execute("CREATE TABLE generations (ordinal INTEGER PRIMARY KEY)")
        database.execute(f"PRAGMA user_version = {version}")
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(errors.StateUnusable, match=message):
        await Store.open(tmp_path)
    assert (tmp_path / FILE).read_bytes() == before


async def test_a_database_of_another_program_is_not_changed(tmp_path: Path) -> None:
    """An intact SQLite file with other tables is rejected and stays as it is."""
    with contextlib.closing(sqlite3.connect(tmp_path / FILE)) as database:
        database.execute("CREATE TABLE songs (name TEXT)")
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(errors.StateUnusable, match=r"was not written by Calotype"):
        await Store.open(tmp_path)
    assert (tmp_path / FILE).read_bytes() == before


@pytest.mark.parametrize("content", [b"not a database " * 1000, b"SQLite format 3\0" + bytes(range(256)) * 64])
async def test_a_file_of_another_program_is_not_changed(tmp_path: Path, content: bytes) -> None:
    """The error has the file name and advice, and the file stays as it is."""
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(errors.StateUnusable, match=r"calotype\.sqlite3 is damaged or .* Move it away"):
        await Store.open(tmp_path)
    assert (tmp_path / FILE).read_bytes() == content


async def test_a_folder_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    """The message has the path and the reason from the operating system."""
    (tmp_path / "file").touch()
    with pytest.raises(
        errors.StateUnusable, match=r"file/state.* cannot be opened \(Not a directory\).*Choose a folder"
    ):
        await Store.open(tmp_path / "file" / "state")


async def test_only_the_owner_can_read_the_files(tmp_path: Path) -> None:
    """Prompts and images are not readable for other users."""
    async with opened(tmp_path / "state") as store:
        await store.accept(record("a"))
        files = [tmp_path / "state", *(tmp_path / "state").iterdir()]
        assert len(files) > 1
        assert all(file.stat().st_mode & 0o077 == 0 for file in files)


@contextlib.contextmanager
def full_disk(size: int):
    """Limits the size of files to `size` bytes during the block."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_a_full_disk_is_a_temporary_error(tmp_path: Path) -> None:
    """A failed write changes nothing, its error does not reveal a path, and a retry succeeds."""
    large = Succeeded(EncodedImage("png", 64, 48, bytes(1_000_000)), Timings())
    async with opened(tmp_path) as store:
        await store.accept(record("a"))
        with full_disk(500_000), capture_logs() as logs, pytest.raises(errors.StateUnavailable) as caught:
            await store.end("a", large, step=1, total_steps=1)
        assert caught.value.retry_after is not None
        assert str(tmp_path) not in str(caught.value)
        assert [line["log_level"] for line in logs] == ["error", "error"]
        assert store.problem == "The server cannot access its state right now."
        assert (await store.load())[0].end is None
        await store.end("a", large, step=1, total_steps=1)
        assert store.problem is None
    async with opened(tmp_path) as store:
        assert await store.image("a") == large.image.data


async def test_a_later_version_can_add_fields_and_reasons(tmp_path: Path) -> None:
    """Unknown fields are ignored, missing ones get defaults, and an unknown reason becomes GenerationFailed."""
    async with opened(tmp_path) as store:
        await store.accept(record("a"))
        await store.end("a", Failed(errors.Cancelled("gone"), Timings()), step=1, total_steps=3)
    with contextlib.closing(sqlite3.connect(tmp_path / FILE)) as database, database:
        sealed_record, sealed_end = database.execute("SELECT record, ended FROM generations").fetchone()
        document = json.loads(unseal("record", "", sealed_record))
        document["job"]["upscale"], document["mood"] = 2, "blue"
        del document["delivery"]["grace"]
        end = json.loads(unseal("end", "a", sealed_end))
        end["error"]["reason"], end["error"]["colour"] = "MELTED", "red"
        values = seal("record", "", json.dumps(document).encode()), seal("end", "a", json.dumps(end).encode())
        database.execute("UPDATE generations SET record = ?, ended = ?", values)
    async with opened(tmp_path) as store:
        (kept,) = await store.load()
    assert replace(kept, end=None) == record("a")
    assert type(kept.end.error) is errors.GenerationFailed
    assert kept.end.error.message == "gone"


@pytest.mark.parametrize("name", ["store.open", "store.load"])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), SystemExit(3)])
async def test_an_unreadable_disk_prevents_the_start_with_advice(
    tmp_path: Path, name: str, error: BaseException
) -> None:
    """An exception of any class when the server starts is reported to the operator; the folder is free again."""

    def fail() -> None:
        raise error

    with injected(name, fail), pytest.raises(errors.StateUnusable, match=r"--state: "):
        async with opened(tmp_path) as store:
            await store.load()
    async with opened(tmp_path) as store:
        assert await store.load() == []


async def test_a_problem_ends_when_the_disk_can_be_written(tmp_path: Path, monkeypatch) -> None:
    """The store checks by itself, because no other write may come."""
    monkeypatch.setattr("calotype_server.generations.store._PROBE_SECONDS", 0.01)

    def fail() -> None:
        raise OSError(28, "No space left on device")

    async with opened(tmp_path) as store:
        with injected("store.accept", fail), pytest.raises(errors.StateUnavailable):
            await store.accept(record("a"))
        assert store.problem is not None
        async with asyncio.timeout(20):
            while store.problem is not None:  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(0.01)


def test_the_store_imports_neither_torch_nor_protobuf() -> None:
    """The store can be imported without heavy libraries."""
    heavy = "{'torch', 'google.protobuf', 'grpc'}"
    code = f"import sys, calotype_server.generations.store; sys.exit(bool({heavy} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
