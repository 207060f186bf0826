"""Faults of the disk: images stay correct or become typed errors, the server starts, and accepted work is not lost."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import resource
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from calotype_server import errors
from calotype_server.auth.access import Caller
from calotype_server.generations import state_writer
from calotype_server.generations.store import Store
from calotype_server.types import DeliveryOptions, DisconnectPolicy, Job, Succeeded
from support.engine.fake_engine import FakeEngine
from support.faults import Fault, Faults
from support.history import SUCCEEDED, History, violations
from support.history.rows import copy_state
from support.runtime import running_runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FILE = "calotype.sqlite3"
LOG = f"{FILE}-wal"
NOBODY = 65534
ENDED, UNFINISHED = 6, 2
PATIENCE = 20

thorough = settings().max_examples > 200
SEEDS = range(60 if thorough else 5)


def job(seed: int) -> Job:
    """Returns the job whose image is grey, of the brightness `seed`."""
    return Job("a cat", None, 48, 48, 2, 3.0, seed, "DDIMScheduler")


@dataclass(frozen=True)
class Known:
    """The generations in a state folder: the digest of the image of those that ended, and the ids of the others."""

    images: dict[str, str]
    unfinished: list[str]


@contextlib.asynccontextmanager
async def serving(folder: Path, engine: FakeEngine):
    """Yields a running server's runtime, with a slot for each unfinished generation."""
    async with (
        Store.opened(folder) as store,
        running_runtime(engine, store=store, max_active=UNFINISHED, retain_bytes=2**24) as runtime,
    ):
        yield runtime


async def fill(folder: Path, target: Path) -> Known:
    """Ends some generations, leaves others unfinished, and copies the folder to `target`, as a crash would leave it."""
    engine, images, unfinished = FakeEngine(), {}, []
    keep = DeliveryOptions(on_disconnect=DisconnectPolicy.KEEP)
    async with serving(folder, engine) as runtime:
        for seed in range(ENDED):
            async with runtime.generations.start(job(seed), keep) as reader:
                updates = [update async for update, _ in reader]
            images[reader.generation.id] = hashlib.sha256(updates[-1].state.end.image.data).hexdigest()
        engine.hold()
        for seed in range(UNFINISHED):
            async with runtime.generations.start(job(100 + seed), keep) as reader:
                unfinished.append(reader.generation.id)
        copy_state(folder, target)
    return Known(images, unfinished)


def flip_bits(path: Path, chance: random.Random) -> None:
    """Flips up to three bits."""
    data = bytearray(path.read_bytes())
    for _ in range(chance.randint(1, 3)):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def zero_a_block(path: Path, chance: random.Random) -> None:
    """Overwrites 512 bytes with zeros."""
    data = bytearray(path.read_bytes())
    start = chance.randrange(0, len(data), 512)
    data[start : start + 512] = bytes(min(512, len(data) - start))
    path.write_bytes(data)


def truncate(path: Path, chance: random.Random) -> None:
    """Cuts the end off."""
    os.truncate(path, chance.randrange(path.stat().st_size))


DAMAGE = [(FILE, flip_bits), (FILE, zero_a_block), (FILE, truncate), (LOG, flip_bits), (LOG, truncate)]
UNKNOWN = ("GENERATION_NOT_FOUND", "OTHER_REPLICA")
FORGIVEN = (truncate, zero_a_block)
"""These can destroy the last trace of a generation; the server cannot know about it."""


@pytest.mark.parametrize(("name", "damage"), DAMAGE, ids=[f"{damage.__name__}-{name}" for name, damage in DAMAGE])
@pytest.mark.parametrize("seed", SEEDS)
async def test_a_damaged_file_gives_correct_images_or_typed_errors(
    tmp_path: Path, name: str, damage: Callable[[Path, random.Random], None], seed: int
) -> None:
    """The server starts; it never serves a wrong image as a success, and unfinished generations still end."""
    known = await fill(tmp_path / "before", tmp_path / "state")
    if name == FILE:
        # Moves the write-ahead log into the file, as an orderly stop does.
        async with Store.opened(tmp_path / "state") as store:
            await store.load()
    if not (tmp_path / "state" / name).exists():
        pytest.skip("there is no write-ahead log")
    damage(tmp_path / "state" / name, random.Random(seed))
    outcomes = await serve_all(tmp_path / "state", known)
    for generation_id, digest in known.images.items():
        outcome = outcomes[generation_id]
        assert outcome in (digest, "DATA_LOSS") or (outcome in UNKNOWN and is_forgiven(name, damage))
    for generation_id in known.unfinished:
        outcome = outcomes[generation_id]
        assert len(outcome) == 64 or outcome == "DATA_LOSS" or is_forgiven(name, damage), outcome


def is_forgiven(name: str, damage: Callable) -> bool:
    """Whether the damage may remove generations without a trace. SQLite ignores damaged ends of its log."""
    return damage in FORGIVEN or name == LOG


async def serve_all(folder: Path, known: Known) -> dict[str, str]:
    """Serves a folder until all has ended; returns the digest of the image, or the reason, of each generation."""
    outcomes = {}
    async with asyncio.timeout(PATIENCE), serving(folder, FakeEngine()) as runtime:
        for generation_id in (*known.images, *known.unfinished):
            try:
                generation = runtime.generations.find(generation_id, Caller(""))
                await generation.finished()
            except errors.ServiceError as error:
                outcomes[generation_id] = error.reason
                continue
            end = generation.events.state.end
            succeeded = isinstance(end, Succeeded)
            outcomes[generation_id] = hashlib.sha256(end.image.data).hexdigest() if succeeded else end.error.reason
    return outcomes


@contextlib.contextmanager
def limited(folder: Path) -> Iterator[None]:
    """The kernel lets no file of this process grow beyond the size of the write-ahead log."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((folder / LOG).stat().st_size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def slow(folder: Path) -> contextlib.AbstractContextManager[object]:
    """Every write takes longer."""
    return Faults([Fault.parse(f"store.{name}=delay:0.02") for name in ("accept", "attempt", "end")])


@contextlib.contextmanager
def frozen(folder: Path) -> Iterator[None]:
    """A write hangs for some time, as on a file system that is being frozen for a snapshot."""
    with Faults([Fault.parse("store.end=hang@1")]) as faults:
        releasing = asyncio.get_running_loop().call_later(0.3, faults.release)
        yield
        releasing.cancel()


@pytest.mark.parametrize("fault", [limited, slow, frozen])
async def test_an_unusable_disk_loses_nothing(tmp_path: Path, fault, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the disk is full, slow or frozen, calls are rejected or end; a restart finds all accepted work."""
    monkeypatch.setattr(state_writer, "_PATIENCE_SECONDS", 0.05)
    history, folder = History(), tmp_path / "state"
    accepted = []
    async with asyncio.timeout(PATIENCE), serving(folder, FakeEngine()) as runtime:
        await generate(history, runtime, 1)
        with fault(folder):
            for seed in range(2, 6):
                accepted.append(await generate(history, runtime, seed))
        accepted.append(await generate(history, runtime, 6))
        await asyncio.gather(*(each.finished() for each in runtime.generations.running))
        history.settled(active=runtime.admission.active, waiting=runtime.admission.waiting)
    known = Known({}, [each for each in accepted if each])
    outcomes = await serve_all(folder, known)
    assert all(len(outcome) == 64 for outcome in outcomes.values()), outcomes
    await history.store(folder)
    assert [str(each) for each in violations(history)] == []


async def generate(history: History, runtime, seed: int) -> str | None:
    """Generates an image and returns the id of its generation; None if the call is rejected."""
    log = history.reader(recipe=str(seed))
    try:
        async with runtime.generations.start(job(seed), DeliveryOptions()) as reader:
            async for update, _ in reader:
                state = update.state
                log.saw(reader.generation.id, state.sequence, state.phase.name, state.step)
    except errors.ServiceError as error:
        log.refused(error.reason)
        return None
    image = state.end.image.data if isinstance(state.end, Succeeded) else None
    log.ended(SUCCEEDED if image else state.end.error.reason, image, persisted=state.end.persisted)
    return reader.generation.id


def test_a_read_only_folder_prevents_the_start_with_advice() -> None:
    """A server that may not write says so at the start, and changes nothing."""
    # Not `tmp_path`, which only the user that runs the tests may enter.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "state"
        asyncio.run(fill(folder, Path(name) / "copy"))
        content = (folder / FILE).read_bytes()
        Path(name).chmod(0o755)
        folder.chmod(0o555)
        for path in folder.iterdir():
            path.chmod(0o444)
        try:
            with without_root(), pytest.raises(errors.StateUnusable, match=r"--state: .*state"):
                asyncio.run(Store.open(folder))
        finally:
            folder.chmod(0o755)
        assert (folder / FILE).read_bytes() == content


@contextlib.contextmanager
def without_root() -> Iterator[None]:
    """Gives up the privileges of root, which permissions do not stop."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if user == 0:
            os.seteuid(0)


async def test_a_second_server_on_the_same_folder_does_not_start(tmp_path: Path) -> None:
    """It says that the folder is in use; the first server is not disturbed."""
    history = History()
    async with serving(tmp_path, FakeEngine()) as runtime:
        await generate(history, runtime, 1)
        with pytest.raises(errors.StateUnusable, match="in use by another"):
            await Store.open(tmp_path)
        await generate(history, runtime, 2)
    await history.store(tmp_path)
    assert violations(history) == []
