"""The use case as a whole: whatever callers do in whatever order, what they may rely on holds."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calotype_server import errors
from calotype_server.auth.access import Caller
from calotype_server.generations.admission import Admission
from calotype_server.generations.estimates import StepTimeEstimator
from calotype_server.generations.lifecycle import Generations
from calotype_server.generations.retention import Retention
from calotype_server.images.encoder import Encoder
from calotype_server.types import DeliveryOptions, DisconnectPolicy, Job, Phase
from support.engine.fake_engine import FakeEngine

JOB = Job("a cat", None, 16, 16, 3, 3.0, 0, "DDIMScheduler")

actions = st.lists(
    st.tuples(
        st.sampled_from(["start", "keep", "watch", "read", "step", "leave", "cancel", "finish", "expire"]),
        st.integers(0, 7),
    ),
    max_size=40,
)


class Reader:
    """One subscriber, who reads when told to, and notes what it saw."""

    def __init__(self, generations: Generations, generation) -> None:
        self.updates = generations.follow(generation)
        self.sequences: list[int] = []
        self.ends = 0
        self.left = False

    async def read(self, patience: float) -> None:
        """Reads one update, if there is one in time."""
        if self.left or self.ends:
            return
        task = asyncio.ensure_future(anext(self.updates))
        done, _ = await asyncio.wait({task}, timeout=patience)
        if not done:
            # Cancelling a generator ends it, as a call that is cancelled does.
            task.cancel()
            await asyncio.wait({task})
            self.left = True
            return
        update, _ = task.result()
        self.sequences.append(update.state.sequence)
        self.ends += update.state.end is not None
        if self.ends:
            with pytest.raises(StopAsyncIteration):
                await anext(self.updates)

    async def leave(self) -> None:
        """Goes away."""
        self.left = True
        await self.updates.aclose()


@given(actions)
@settings(max_examples=40, deadline=None)
def test_any_interleaving_keeps_what_callers_rely_on(script: list) -> None:
    """Sequences rise, everybody who stays gets exactly one end, and every slot is returned."""
    asyncio.run(play(script))


def test_a_cancel_that_comes_while_the_file_is_encoded_counts() -> None:
    """Whoever was told that there was something to cancel gets no success."""

    async def cancel_late() -> None:
        class Late(Encoder):
            async def final(self, *arguments):
                assert generations.cancel(generation.id, Caller("")) is Phase.DECODING
                return await super().final(*arguments)

        engine, pace, encoder = FakeEngine(), StepTimeEstimator(), Late()
        ended: Retention = Retention(seconds=600, count=3, size=2**20)
        generations = Generations(
            engine, Admission(pace, max_active=1, max_queue=1), pace, encoder, ended, max_active=1, on_dead=lambda: None
        )
        generation = await generations.start(JOB, DeliveryOptions())
        await generations.idle()
        generations.close()
        encoder.close()
        assert generation.log.state.phase is Phase.CANCELLED

    asyncio.run(cancel_late())


async def play(script: list) -> None:
    """Carries out a script, then lets everything end."""
    engine, pace, encoder = FakeEngine(), StepTimeEstimator(), Encoder()
    engine.hold()
    admission = Admission(pace, max_active=2, max_queue=3)
    ended: Retention = Retention(seconds=600, count=3, size=2**20)
    generations = Generations(engine, admission, pace, encoder, ended, max_active=2, on_dead=lambda: None)
    started, readers = [], []
    try:
        for action, which in script:
            generation = started[which % len(started)] if started else None
            reader = readers[which % len(readers)] if readers else None
            match action:
                case "start" | "keep":
                    policy = DisconnectPolicy.KEEP if action == "keep" else DisconnectPolicy.CANCEL
                    try:
                        started.append(await generations.start(JOB, DeliveryOptions(on_disconnect=policy)))
                    except errors.QueueFull:
                        continue
                    readers.append(Reader(generations, started[-1]))
                case "watch" if generation is not None:
                    readers.append(Reader(generations, generation))
                case "read" if reader is not None:
                    await reader.read(0.02)
                case "step":
                    engine.allow(1)
                case "leave" if reader is not None:
                    await reader.leave()
                case "cancel" | "finish" if generation is not None:
                    try:
                        getattr(generations, action)(generation.id, Caller(""))
                    except errors.GenerationNotFound:
                        assert generation.ended
                case "expire":
                    ended.expire()
        engine.allow()
        for reader in readers:
            while not reader.left and not reader.ends:
                await reader.read(20)
        for generation in started:
            generation.end_early(errors.Cancelled("the script is over"))
        await asyncio.wait_for(generations.idle(), 20)
    finally:
        engine.close()
        await generations.end_all()
        generations.close()
        encoder.close()
    assert admission.active == 0
    assert len(ended) <= 3
    for generation in started:
        assert generation.log.state.phase in (Phase.SUCCEEDED, Phase.CANCELLED)
        assert generation.readers == 0
    for reader in readers:
        assert reader.sequences == sorted(set(reader.sequences))
        assert reader.left or reader.ends == 1
