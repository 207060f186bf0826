"""Guarantees that hold for any sequence of calls by any number of callers."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calotype_server import errors
from calotype_server.auth.access import Caller
from calotype_server.images.encoder import Encoder
from calotype_server.types import DeliveryOptions, DisconnectPolicy, Job, Phase
from support.engine.fake_engine import FakeEngine
from support.runtime import running_runtime

JOB = Job("a cat", None, 16, 16, 3, 3.0, 0, "DDIMScheduler")

actions = st.lists(
    st.tuples(
        st.sampled_from(["start", "keep", "watch", "read", "step", "leave", "cancel", "finish", "expire"]),
        st.integers(0, 7),
    ),
    max_size=40,
)


class ScriptedReader:
    """One reader that reads when the script says so, and records what it saw."""

    def __init__(self) -> None:
        self.sequences: list[int] = []
        self.ends = 0
        self.left = False
        self._stack = contextlib.AsyncExitStack()

    async def open(self, opening) -> ScriptedReader:
        """Enters `Generations.start` or `Generations.follow`."""
        self._updates = await self._stack.enter_async_context(opening)
        return self

    @property
    def generation(self):
        """The generation it reads."""
        return self._updates.generation

    async def read(self, patience: float) -> None:
        """Reads one update if there is one within `patience` seconds; leaves otherwise."""
        if self.left or self.ends:
            return
        try:
            update, _ = await asyncio.wait_for(anext(self._updates), patience)
        except TimeoutError:
            await self.leave()
            return
        self.sequences.append(update.state.sequence)
        self.ends += update.state.end is not None
        if self.ends:
            with pytest.raises(StopAsyncIteration):
                await anext(self._updates)

    async def leave(self) -> None:
        """Leaves its block."""
        self.left = True
        await self._stack.aclose()


@given(actions)
@settings(max_examples=40, deadline=None)
def test_any_interleaving_keeps_the_guarantees(script: list) -> None:
    """Sequence numbers rise, every reader that stays gets exactly one end, and every slot is returned."""
    asyncio.run(play(script))


async def test_a_cancel_during_encoding_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a successful cancel, the generation does not end as succeeded."""

    async def cancel_then_encode(encoder: Encoder, *arguments):
        assert generations.cancel(generation.id, Caller("")) == (Phase.DECODING, True)
        return await encode(encoder, *arguments)

    encode = Encoder.final
    monkeypatch.setattr(Encoder, "final", cancel_then_encode)
    async with running_runtime(FakeEngine()) as runtime:
        generations = runtime.generations
        async with generations.start(JOB, DeliveryOptions()) as reader:
            generation = reader.generation
            async for _ in reader:
                pass
    assert generation.events.state.phase is Phase.CANCELLED


async def test_a_start_that_is_cancelled_leaves_no_reader() -> None:
    """Cancelling the task inside the block disconnects its reader, and the generation is aborted."""
    engine = FakeEngine()
    engine.hold()
    async with running_runtime(engine) as runtime:
        generations, entered = runtime.generations, asyncio.Event()

        async def read_forever() -> None:
            async with generations.start(JOB, DeliveryOptions()):
                entered.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(read_forever())
        await entered.wait()
        [generation] = generations.running
        task.cancel()
        await asyncio.wait({task})
        assert (generation.readers, generations.readers) == (0, 0)
        assert isinstance(generation.abort_error, errors.Abandoned)


async def play(script: list) -> None:
    """Carries out a script, then lets everything end."""
    engine = FakeEngine()
    engine.hold()
    readers: list[ScriptedReader] = []
    async with running_runtime(engine, max_active=2, max_queue=3, retain_count=3, retain_bytes=2**20) as runtime:
        generations = runtime.generations
        for action, which in script:
            reader = readers[which % len(readers)] if readers else None
            match action:
                case "start" | "keep":
                    policy = DisconnectPolicy.KEEP if action == "keep" else DisconnectPolicy.CANCEL
                    opening = generations.start(JOB, DeliveryOptions(on_disconnect=policy))
                    with contextlib.suppress(errors.QueueFull):
                        readers.append(await ScriptedReader().open(opening))
                case "watch" if reader is not None:
                    readers.append(await ScriptedReader().open(generations.follow(reader.generation)))
                case "read" if reader is not None:
                    await reader.read(0.02)
                case "step":
                    engine.allow(1)
                case "leave" if reader is not None:
                    await reader.leave()
                case "cancel" | "finish" if reader is not None:
                    try:
                        getattr(generations, action)(reader.generation.id, Caller(""))
                    except errors.GenerationNotFound:
                        assert reader.generation.ended
                case "expire":
                    generations.retained.expire()
        engine.allow()
        for reader in readers:
            while not reader.left and not reader.ends:
                await reader.read(20)
        for reader in readers:
            reader.generation.abort(errors.Cancelled("The script is over."))
            await reader.leave()
        await asyncio.wait_for(generations.idle(), 20)
        assert runtime.admission.active == 0
        assert len(generations.retained) <= 3
    for reader in readers:
        assert reader.generation.events.state.phase in (Phase.SUCCEEDED, Phase.CANCELLED)
        assert reader.generation.readers == 0
        assert reader.sequences == sorted(set(reader.sequences))
        assert reader.ends <= 1
