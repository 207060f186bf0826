"""Every accepted generation ends exactly once, whatever is raised, and wherever."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from typing import TYPE_CHECKING

import pytest
from structlog.testing import capture_logs

from calotype_server import errors
from calotype_server.failpoints import injected
from calotype_server.generations import lifecycle
from calotype_server.generations.event_log import EventLog
from calotype_server.generations.index import GenerationIndex
from calotype_server.generations.store import Store
from calotype_server.types import DeliveryOptions, Event, Failed, Job, Phase, Succeeded
from support.engine.fake_engine import FakeEngine
from support.runtime import running_runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from calotype_server.apps.runtime import Runtime
    from calotype_server.generations.generation import Generation

JOB = Job("unmistakable", None, 16, 16, 3, 3.0, 0, "DDIMScheduler")


class Panic(BaseException):
    """Stands for the panic of a Rust extension, which is not an `Exception`."""


CLASSES: list[type[BaseException]] = [
    RuntimeError,
    MemoryError,
    RecursionError,
    SystemExit,
    KeyboardInterrupt,
    GeneratorExit,
    asyncio.CancelledError,
    concurrent.futures.CancelledError,
    StopIteration,
    StopAsyncIteration,
    Panic,
]
FATAL = ["runner.start", "engine.run", "engine.step", "engine.report", "encoder.final"]
"""Places where an exception ends the generation."""

HARMLESS = ["encoder.preview", "runner.end", "store.call"]
"""Places where an exception costs a preview or a copy on disk, but not the image."""


def raising(kind: type[BaseException]) -> Callable[[], None]:
    """Returns a function that raises an exception of this class."""

    def fail() -> None:
        raise kind("unmistakable")

    return fail


async def generate(runtime: Runtime) -> Generation:
    """Generates an image, reads it to its end, and checks that there is exactly one end."""
    async with runtime.generations.start(JOB, DeliveryOptions()) as reader:
        updates = [update async for update, _ in reader]
    assert [update.state.end is not None for update in updates] == [False] * (len(updates) - 1) + [True]
    return reader.generation


async def assert_works(runtime: Runtime) -> None:
    """Checks that all slots are free, and that the next generation succeeds."""
    assert (runtime.admission.active, runtime.admission.waiting, runtime.generations.running) == (0, 0, [])
    assert (await generate(runtime)).events.state.phase is Phase.SUCCEEDED


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
async def test_an_exception_ends_one_generation(kind: type[BaseException]) -> None:
    """The generation fails with a typed error and one line in the log without its prompt; the next one succeeds."""
    async with running_runtime(FakeEngine()) as runtime:
        for place in FATAL:
            with injected(place, raising(kind)), capture_logs() as logged:
                generation = await generate(runtime)
            end = generation.events.state.end
            assert isinstance(end, Failed), place
            assert isinstance(end.error, errors.GenerationFailed | errors.Draining), place
            assert "unmistakable" not in end.error.message
            ends = [line for line in logged if line["event"] == "generation ended"]
            assert [line["outcome"] for line in ends] == [end.error.reason], place
            await assert_works(runtime)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
async def test_an_exception_next_to_a_generation_keeps_its_image(kind: type[BaseException], tmp_path: Path) -> None:
    """A failed preview, a failed store or a failed end costs no more than that; the next generation succeeds."""
    async with Store.opened(tmp_path) as store, running_runtime(FakeEngine(), store=store) as runtime:
        for place in HARMLESS:
            with injected(place, raising(kind)), contextlib.suppress(errors.StateUnavailable):
                generation = await generate(runtime)
                assert isinstance(generation.events.state.end, Succeeded), place
            await runtime.generations.idle()
            await store.probe()
            await assert_works(runtime)


@pytest.mark.parametrize("kind", [Panic, asyncio.CancelledError])
async def test_an_end_that_an_exception_keeps_from_the_disk_is_not_persisted(
    kind: type[BaseException], tmp_path: Path
) -> None:
    """The reader gets the image, and both the reader and the log learn that a crash may lose it."""
    async with Store.opened(tmp_path) as store, running_runtime(FakeEngine(), store=store) as runtime:
        with injected("runner.end", raising(kind)), capture_logs() as logged:
            end = (await generate(runtime)).events.state.end
        assert isinstance(end, Succeeded)
        assert not end.persisted
        assert [line["not_persisted"] for line in logged if line["event"] == "generation ended"] == [True]
        assert [record.end for record in await store.load()] == [None]


async def test_the_end_of_a_rejected_generation_is_not_persisted(tmp_path: Path) -> None:
    """If the disk did not accept a generation, the log does not report its end as final."""
    async with Store.opened(tmp_path) as store, running_runtime(FakeEngine(), store=store) as runtime:
        with injected("store.accept", raising(OSError)), capture_logs() as logged:
            with pytest.raises(errors.StateUnavailable):
                await generate(runtime)
            await runtime.generations.idle()
        assert [line["not_persisted"] for line in logged if line["event"] == "generation ended"] == [True]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
async def test_failing_observers_change_nothing(kind: type[BaseException]) -> None:
    """Metrics and traces that raise cost neither a preview nor an end, and fill the log with one line per kind."""

    def observe(observation: object) -> None:
        raise kind

    with capture_logs() as logged:
        async with running_runtime(FakeEngine(), observe=observe) as runtime:
            await assert_works(runtime)
            await assert_works(runtime)
    failures = [line["observation"] for line in logged if line["event"] == "an observer failed"]
    assert len(failures) == len(set(failures))
    assert "GenerationEnded" in failures


@pytest.mark.parametrize("part", ["persist_end", "end"])
@pytest.mark.parametrize("kind", [ValueError, SystemExit])
async def test_a_failing_index_does_not_lose_an_end(
    kind: type[BaseException], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors in storing or retaining a generation are logged, and its reader still gets the image."""
    async with running_runtime(FakeEngine()) as runtime:
        with monkeypatch.context() as patched:
            patched.setattr(GenerationIndex, part, lambda *_: raising(kind)())
            with capture_logs() as logged:
                generation = await generate(runtime)
        assert isinstance(generation.events.state.end, Succeeded)
        assert any(line["log_level"] == "error" for line in logged)
        await assert_works(runtime)


async def test_an_end_that_cannot_be_published_does_not_delay_the_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slot is free, and the server does not wait for a generation whose task has ended."""
    async with running_runtime(FakeEngine()) as runtime:
        with monkeypatch.context() as patched:
            patched.setattr(EventLog, "publish", fail_at_the_end(EventLog.publish))
            async with runtime.generations.start(JOB, DeliveryOptions()) as reader:
                await reader.generation.finished()
        await assert_works(runtime)


def fail_at_the_end(publish: Callable[[EventLog, Event], None]) -> Callable[[EventLog, Event], None]:
    """Returns a method that publishes everything except ends."""

    def fail(log: EventLog, event: Event) -> None:
        if isinstance(event, Succeeded | Failed):
            raise MemoryError
        publish(log, event)

    return fail


@pytest.mark.parametrize("place", ["runner.start", "engine.run"])
async def test_a_generation_that_fails_while_it_is_aborted_ends_with_the_abort(place: str) -> None:
    """A request may start again once its generation is abandoned, so that one must not end in any other way."""
    loop = asyncio.get_running_loop()
    async with running_runtime(FakeEngine()) as runtime:

        def abandon() -> None:
            (generation,) = runtime.generations.running
            assert generation.abort(errors.Abandoned("The last reader left."))

        async def abandon_in_the_loop() -> None:
            abandon()

        def abandon_and_fail() -> None:
            if threading.current_thread() is threading.main_thread():
                abandon()
            else:
                asyncio.run_coroutine_threadsafe(abandon_in_the_loop(), loop).result(20)
            raise RuntimeError

        with injected(place, abandon_and_fail):
            generation = await generate(runtime)
        end = generation.events.state.end
        assert isinstance(end, Failed)
        assert isinstance(end.error, errors.Abandoned)


async def test_an_abort_after_the_end_is_decided_comes_too_late() -> None:
    """While the end is stored, an abort changes nothing: the same request still gets this generation."""
    delivery = DeliveryOptions(caller="a", request_id="1")
    async with running_runtime(FakeEngine()) as runtime:
        aborted = []

        def abandon() -> None:
            (generation,) = runtime.generations.running
            aborted.append(generation.abort(errors.Abandoned("The last reader left.")))
            assert not generation.is_replaceable

        with injected("runner.end", abandon):
            async with runtime.generations.start(JOB, delivery) as reader:
                updates = [update async for update, _ in reader]
        assert aborted == [False]
        assert isinstance(updates[-1].state.end, Succeeded)


async def test_a_cancelled_run_ends_its_generation() -> None:
    """If the event loop cancels the task of a generation, its readers get DRAINING, and the engine is stopped."""
    engine = FakeEngine()
    engine.hold()
    async with running_runtime(engine) as runtime, runtime.generations.start(JOB, DeliveryOptions()) as reader:
        assert await asyncio.to_thread(engine.at_step.acquire, timeout=20)
        [task] = [each for each in asyncio.all_tasks() if each.get_name() == f"generation-{reader.generation.id}"]
        task.cancel()
        updates = [update async for update, _ in reader]
        assert isinstance(updates[-1].state.end, Failed)
        assert isinstance(updates[-1].state.end.error, errors.Draining)
        assert engine.stops[0].is_set()
        assert runtime.admission.active == 0


class Hang:
    """An action of a failpoint that hangs until the end of the test."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self._gate = threading.Event()

    def __call__(self) -> None:
        """Hangs the calling thread."""
        self.entered.release()
        self._gate.wait()

    async def has_begun(self) -> None:
        """Waits until a thread hangs."""
        assert await asyncio.to_thread(self.entered.acquire, timeout=20)

    def end(self) -> None:
        """Lets all threads continue."""
        self._gate.set()


@pytest.fixture
def hang() -> Iterator[Hang]:
    """A hang that ends with the test."""
    hang = Hang()
    yield hang
    hang.end()


@pytest.mark.parametrize("place", ["engine.run", "engine.step", "engine.report", "encoder.final"])
async def test_threads_that_hang_do_not_delay_the_end_of_all_generations(place: str, hang: Hang) -> None:
    """A thread that does not respond is left behind: its generation and the queued one end with DRAINING."""
    async with running_runtime(FakeEngine()) as runtime, contextlib.AsyncExitStack() as stack:
        with injected(place, hang):
            readers = [
                await stack.enter_async_context(runtime.generations.start(JOB, DeliveryOptions())) for _ in range(2)
            ]
            await hang.has_begun()
            with capture_logs() as logged:
                assert not await runtime.generations.abort_all(0.01)
            for reader in readers:
                [*_, last] = [update async for update, _ in reader]
                assert isinstance(last.state.end, Failed)
                assert isinstance(last.state.end.error, errors.Draining)
            [left] = [line for line in logged if line["event"] == "threads do not respond and are left behind"]
            assert any("__call__" in frame for frames in left["stacks"].values() for frame in frames)
            hang.end()


async def test_a_disk_that_hangs_does_not_delay_the_end_of_all_generations(
    tmp_path: Path, hang: Hang, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image that cannot be stored is still delivered before the server stops."""
    monkeypatch.setattr(lifecycle, "_DISK_SECONDS", 0.01)
    engine = FakeEngine()
    engine.hold()
    async with Store.opened(tmp_path) as store, running_runtime(engine, store=store) as runtime:
        async with runtime.generations.start(JOB, DeliveryOptions()) as reader:
            with injected("store.call", hang):
                engine.allow()
                await hang.has_begun()
                with capture_logs() as logged:
                    assert not await runtime.generations.abort_all(0.01)
            [*_, last] = [update async for update, _ in reader]
            assert isinstance(last.state.end, Succeeded)
            assert "ends of generations are not stored, because the disk does not respond" in [
                line["event"] for line in logged
            ]
        hang.end()


async def test_an_encoder_that_hangs_ends_its_generation(hang: Hang) -> None:
    """The generation fails with a typed error, the runtime reports the problem, and the next generation succeeds."""
    async with running_runtime(FakeEngine(), encode_timeout_seconds=0.3) as runtime:
        with injected("encoder.final", hang):
            end = (await generate(runtime)).events.state.end
        assert isinstance(end, Failed)
        assert isinstance(end.error, errors.GenerationFailed)
        assert runtime.problems() == ["encoder threads that hang: 1"]
        await assert_works(runtime)
        hang.end()


async def test_a_preview_that_hangs_costs_one_preview(hang: Hang) -> None:
    """Readers continue without the preview, and the generation succeeds."""
    async with running_runtime(FakeEngine(), encode_timeout_seconds=0.3) as runtime:
        with injected("encoder.preview", hang):
            assert isinstance((await generate(runtime)).events.state.end, Succeeded)
        hang.end()


async def test_an_encoder_without_threads_stops_the_server(hang: Hang) -> None:
    """When so many threads hang that no image can be encoded, only a new process helps."""
    async with running_runtime(FakeEngine(), encode_timeout_seconds=0.01) as runtime:
        with injected("encoder.final", hang):
            while not runtime.dead.is_set():
                assert isinstance((await generate(runtime)).events.state.end, Failed)
            # No thread is left for this one, and it ends at once.
            assert isinstance((await generate(runtime)).events.state.end, Failed)
        hang.end()
