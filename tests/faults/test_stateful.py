"""Any sequence of calls, crashes, restarts and full disks, compared with a simple model of the promises."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from calotype_server import errors
from calotype_server.auth.access import Caller
from calotype_server.generations import state_writer
from calotype_server.observability.events import GenerationEnded
from calotype_server.types import DeliveryOptions, DisconnectPolicy, Failed, Job, Succeeded
from faults.crashing import STORE_POINTS, CrashingServer
from support.history import SUCCEEDED, History, violations

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from calotype_server.generations.generation import Generation
    from calotype_server.observability.events import Observation
    from support.history import ReaderLog

PATIENCE = 20
STEPS = 2
SLOTS = st.integers(1, 2)
PLACES = st.integers(0, 2)
CALLERS = st.sampled_from(["a", "b"])
WHICH = st.integers(0, 7)

thorough = settings().max_examples > 200
settings_of_this_profile = settings(
    max_examples=250 if thorough else 12,
    stateful_step_count=40 if thorough else 25,
    deadline=None,
    # Shrinking a failure takes minutes, because each run starts servers.
    phases=tuple(Phase) if thorough else (Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


def outcome_of(end: Any) -> str:
    """Returns SUCCEEDED or the reason of an error."""
    return SUCCEEDED if isinstance(end, Succeeded) else end.error.reason


class OpenReader:
    """A reader that reads when a rule says so."""

    def __init__(self, log: ReaderLog) -> None:
        self.log = log
        self.done = False
        self._stack = contextlib.AsyncExitStack()
        self._reader: Any = None

    async def open(self, opening: Any) -> Generation | None:
        """Enters `Generations.start` or `follow`. Returns the generation; None if the call is rejected."""
        try:
            self._reader = await self._stack.enter_async_context(opening)
        except errors.ServiceError as error:
            self.close(error.reason)
            return None
        return self._reader.generation

    async def read(self) -> None:
        """Reads one update if there is one."""
        if self.done:
            return
        reading = asyncio.ensure_future(anext(self._reader))
        for _ in range(50):
            await asyncio.sleep(0)
        if not reading.done():
            reading.cancel()
            await asyncio.wait({reading})
            self.log.left()
            await self.leave()
            return
        state = reading.result()[0].state
        self.log.saw(self._reader.generation.id, state.sequence, state.phase.name, state.step)
        if state.end is not None:
            image = state.end.image.data if isinstance(state.end, Succeeded) else None
            early = getattr(state.end, "finished_early", False)
            self.log.ended(outcome_of(state.end), image, early=early, persisted=state.end.persisted)
            await self.leave()

    async def leave(self) -> None:
        """Leaves the block."""
        self.done = True
        await self._stack.aclose()

    def close(self, reason: str = "") -> None:
        """The call failed, or its connection broke."""
        if not self.done:
            self.done = True
            self.log.refused(reason)


class Promises(RuleBasedStateMachine):
    """Generations, their index, the store and the queue around a fake engine.

    The model is small: which generations were accepted, by caller and request id, and how they ended.
    """

    def __init__(self) -> None:
        super().__init__()
        self._patch = pytest.MonkeyPatch()
        # A full disk is not waited for.
        self._patch.setattr(state_writer, "_PATIENCE_SECONDS", 0.05)
        self._folder = tempfile.TemporaryDirectory()
        self._runner = asyncio.Runner()
        self._history = History()
        self._readers: list[OpenReader] = []
        self._accepted: dict[str, tuple[str, str]] = {}
        """Caller and request id of each generation that a caller saw accepted and that was not forgotten."""
        self._ends: dict[str, tuple[str, str]] = {}
        """Outcome, and digest of the image, of each durable end that was seen."""
        self._ended: set[str] = set()
        """Generations that ended, also if the server could not store that."""
        self._crashes_left = 4

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Runs a rule. A crash inside of the store ends it, and another process takes over."""

        async def limited() -> Any:
            async with asyncio.timeout(PATIENCE):
                result = await self._server.run(work)
                if self._server.crashed.is_set():
                    await self._take_over(self._server.slots, self._server.max_queue)
                return result

        return self._runner.run(limited())

    async def _take_over(self, slots: int, max_queue: int) -> None:
        for reader in self._readers:
            reader.close()
        self._readers.clear()
        self._history.crashed()
        self._ended &= set(self._ends)
        await self._server.crash()
        await self._server.start(slots, max_queue)

    @property
    def _generations(self) -> Any:
        return self._server.runtime.generations

    def _observe(self, event: Observation) -> None:
        if isinstance(event, GenerationEnded):
            self._note_end(event.generation_id, event.end)

    def _note_end(self, generation_id: str, end: Succeeded | Failed) -> None:
        if outcome_of(end) == "DRAINING":
            return
        self._ended.add(generation_id)
        if end.persisted:
            shown = outcome_of(end), end.image.data.hex() if isinstance(end, Succeeded) else ""
            assert self._ends.setdefault(generation_id, shown) == shown

    def _pick(self, which: int) -> str | None:
        return sorted(self._accepted)[which % len(self._accepted)] if self._accepted else None

    @initialize(slots=SLOTS, places=PLACES)
    def start_the_server(self, slots: int, places: int) -> None:
        async def start() -> None:
            self._server = CrashingServer(Path(self._folder.name), self._observe)
            await self._server.start(slots, places)

        self._runner.run(start())

    @rule(
        caller=CALLERS,
        request_id=st.sampled_from(["", "", "r1", "r2"]),
        seed=st.integers(0, 1),
        policy=st.sampled_from(DisconnectPolicy),
        grace=st.sampled_from([0.0, 60.0]),
    )
    def start(self, caller: str, request_id: str, seed: int, policy: DisconnectPolicy, grace: float) -> None:
        """A caller starts a generation, or repeats a request."""
        job = Job("a cat", None, 16, 16, STEPS, 3.0, seed, "DDIMScheduler")
        delivery = DeliveryOptions(caller, on_disconnect=policy, grace=grace, request_id=request_id)
        log = self._history.reader(caller=caller, request_id=request_id, recipe=str(seed))
        reader = OpenReader(log)
        generation = self._do(reader.open(self._generations.start(job, delivery)))
        if generation is None:
            reader.close()
            return
        log.saw(generation.id, 0, "queued", 0)
        self._accepted[generation.id] = caller, request_id
        self._readers.append(reader)

    @rule(which=WHICH)
    def watch(self, which: int) -> None:
        """Another reader follows a generation."""
        if (generation_id := self._pick(which)) is not None:
            reader = OpenReader(self._history.reader())
            caller = Caller(self._accepted[generation_id][0])

            async def opened() -> Any:
                try:
                    generation = self._generations.find(generation_id, caller)
                except errors.GenerationNotFound as error:
                    reader.close(error.reason)
                    return None
                return await reader.open(self._generations.follow(generation))

            if self._do(opened()) is None:
                reader.close()
            else:
                self._readers.append(reader)

    @rule(which=WHICH)
    def read(self, which: int) -> None:
        """A reader reads a message."""
        if self._readers:
            self._do(self._readers[which % len(self._readers)].read())

    @rule(which=WHICH)
    def disconnect(self, which: int) -> None:
        """A reader disconnects."""
        if self._readers:
            reader = self._readers.pop(which % len(self._readers))
            reader.log.left()
            self._do(reader.leave())

    @rule(which=WHICH, action=st.sampled_from(["cancel", "finish"]))
    def control(self, which: int, action: str) -> None:
        """A caller cancels or finishes a generation."""
        if (generation_id := self._pick(which)) is not None:

            async def control() -> None:
                with contextlib.suppress(errors.GenerationNotFound):
                    getattr(self._generations, action)(generation_id, Caller(self._accepted[generation_id][0]))

            self._do(control())

    @rule(steps=st.integers(1, 4))
    def step(self, steps: int) -> None:
        """The engine makes steps, and everything that follows from them happens."""

        async def step() -> None:
            self._server.engine.allow(steps)
            await asyncio.sleep(0.005)

        self._do(step())

    @rule(full=st.booleans())
    def fill_the_disk(self, full: bool) -> None:
        """The disk becomes full, or has space again."""
        self._server.full = full

    @precondition(lambda self: self._crashes_left)
    @rule(slots=SLOTS, places=PLACES)
    def crash(self, slots: int, places: int) -> None:
        """The process dies between two steps of the event loop, and restarts with other limits."""
        self._crashes_left -= 1
        self._runner.run(self._take_over(slots, places))

    @precondition(lambda self: self._crashes_left)
    @rule(name=st.sampled_from(STORE_POINTS))
    def crash_inside_the_store(self, name: str) -> None:
        """The process dies the next time that the store reaches a failpoint."""
        self._crashes_left -= 1
        self._server.crash_at(name)

    @rule(slots=SLOTS, places=PLACES)
    def restart(self, slots: int, places: int) -> None:
        """The server stops in order, which ends its generations, and restarts with other limits."""

        async def restart() -> None:
            self._server.full = False
            for reader in self._readers:
                reader.log.left()
                await reader.leave()
            self._readers.clear()
            await self._server.stop()
            await self._server.start(slots, places)

        self._do(restart())

    @invariant()
    def limits_hold(self) -> None:
        """The queue never runs more than its slots, and never keeps more new work waiting than it has places."""
        if hasattr(self, "_server"):
            assert self._server.runtime.admission.active <= self._server.slots

    @invariant()
    def accepted_generations_are_kept(self) -> None:
        """Each accepted generation is found until it has ended and newer ones replace it; its end does not change."""
        if not hasattr(self, "_server"):
            return
        for generation_id, (caller, _) in list(self._accepted.items()):
            try:
                generation = self._generations.find(generation_id, Caller(caller))
            except errors.GenerationNotFound:
                assert generation_id in self._ended, f"{generation_id} was accepted, did not end, and is gone"
                self._history.dropped(generation_id)
                del self._accepted[generation_id]
                continue
            end = generation.events.state.end
            if end is None:
                assert generation_id not in self._ends, f"{generation_id} runs again after it ended"
            else:
                self._note_end(generation_id, end)

    def teardown(self) -> None:
        """Heals the disk, lets all generations end, and checks the whole history."""
        try:
            if hasattr(self, "_server"):
                self._runner.run(self._finish())
        finally:
            if hasattr(self, "_server"):
                self._server.abandon()
            self._runner.close()
            self._folder.cleanup()
            self._patch.undo()

    async def _finish(self) -> None:
        async with asyncio.timeout(PATIENCE):
            self._server.crash_at("")
            self._server.full = False
            if self._server.has_crashed:
                await self._take_over(self._server.slots, self._server.max_queue)
            self._server.engine.allow()
            await asyncio.gather(*(each.finished() for each in self._generations.running))
            for reader in self._readers:
                while not reader.done:
                    await reader.read()
            self.accepted_generations_are_kept()
            for generation_id in self._accepted:
                assert generation_id in self._ended, f"{generation_id} never ended"
            admission = self._server.runtime.admission
            self._history.settled(active=admission.active, waiting=admission.waiting)
            await self._server.stop()
            await self._history.store(self._server.state)
        for generation_id, (outcome, _) in self._ends.items():
            log = self._history.reader()
            log.saw(generation_id, 1, "ended", 0)
            log.ended(outcome)
        assert [str(each) for each in violations(self._history)] == []


TestPromises = Promises.TestCase
TestPromises.settings = settings_of_this_profile
