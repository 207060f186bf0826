"""A generation that ends the server's process is tried a second time, and then ends with ENGINE_CRASHED."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import grpc
import pytest
import structlog
from structlog.testing import capture_logs

from calotype.v1 import calotype_pb2 as pb
from calotype.v1.calotype_pb2_grpc import GenerationServiceStub
from calotype_server.failpoints import injected
from calotype_server.observability.redaction import RedactPrompts
from support.engine.fake_engine import FakeEngine
from support.service import open_channel, read_until, running
from support.state.folders import crashed, opened

if TYPE_CHECKING:
    from pathlib import Path

KEEP = pb.DISCONNECT_POLICY_KEEP
LOG: list[structlog.typing.Processor] = [structlog.contextvars.merge_contextvars, RedactPrompts(log_prompts=False)]
"""The parts of the server's log that add the ids of a generation and remove its prompt."""


def request(seed: int) -> pb.GenerateRequest:
    """Returns a request whose generation continues without a reader."""
    return pb.GenerateRequest(prompt="a red apple", seed=seed, request_id=f"r{seed}", on_disconnect=KEEP)


async def attempts(folder: Path) -> dict[int, int]:
    """Returns the stored attempts by seed."""
    async with opened(folder) as store:
        return {record.job.seed: record.attempts for record in await store.load() if record.end is None}


async def start_held(service, *seeds: int) -> list[str]:
    """Starts generations and returns their ids."""
    return [(await service.stub.Generate(request(seed)).read()).generation_id for seed in seeds]


async def at_step(engine: FakeEngine, times: int = 1) -> None:
    """Waits until the engine was about to make a step `times` times."""
    for _ in range(times):
        await asyncio.to_thread(engine.at_step.acquire)


async def test_an_attempt_is_on_disk_before_the_engine_starts(tmp_path: Path) -> None:
    """The running generation has one attempt, the queued one has none."""
    engine = FakeEngine()
    engine.hold()
    async with opened(tmp_path / "state") as store, running(engine, store=store) as service:
        await start_held(service, 1, 2)
        await at_step(engine)
        assert await attempts(crashed(tmp_path / "state", tmp_path / "first")) == {1: 1, 2: 0}
        engine.allow(4)
        await at_step(engine, 4)
        assert await attempts(crashed(tmp_path / "state", tmp_path / "second")) == {2: 1}


async def test_the_engine_does_not_start_without_a_stored_attempt(tmp_path: Path, monkeypatch) -> None:
    """If the attempt cannot be written, the generation ends with STATE_UNAVAILABLE and never reaches the engine."""
    monkeypatch.setattr("calotype_server.generations.state_writer._PATIENCE_SECONDS", 0.05)
    engine = FakeEngine()
    engine.hold()

    def full() -> None:
        raise OSError(28, "No space left on device")

    async with opened(tmp_path) as store, running(engine, store=store) as service:
        first, second = await start_held(service, 1, 2)
        await at_step(engine)
        with injected("store.attempt", full):
            engine.allow()
            watched = service.stub.Watch(pb.WatchRequest(generation_id=second))
            assert (await read_until(watched, pb.PHASE_FAILED)).error.reason == "STATE_UNAVAILABLE"
        await read_until(service.stub.Watch(pb.WatchRequest(generation_id=first)), pb.PHASE_SUCCEEDED)
    assert [job.seed for job in engine.jobs] == [1]


async def test_an_orderly_stop_does_not_count(tmp_path: Path) -> None:
    """After a rolling update, no generation has an attempt."""
    for _ in range(3):
        engine = FakeEngine()
        engine.hold()
        async with opened(tmp_path) as store, running(engine, store=store) as service:
            if not service.generations.running:
                await start_held(service, 1, 2)
            await at_step(engine)
        assert await attempts(tmp_path) == {1: 0, 2: 0}


async def test_after_two_crashes_a_generation_is_given_up(tmp_path: Path) -> None:
    """Its caller gets ENGINE_CRASHED, also after further restarts; the log names it without its prompt."""
    folder, generation_id = tmp_path / "0", ""
    for number in (1, 2):
        engine = FakeEngine()
        engine.hold()
        async with opened(folder) as store, running(engine, store=store) as service:
            if not generation_id:
                [generation_id] = await start_held(service, 1)
            await at_step(engine)
            folder = crashed(folder, tmp_path / str(number))
    engine, reports = FakeEngine(), []
    for _ in range(2):
        async with opened(folder) as store:
            with capture_logs(LOG) as logs:
                async with running(engine, store=store) as service:
                    watched = service.stub.Watch(pb.WatchRequest(generation_id=generation_id))
                    ended = await read_until(watched, pb.PHASE_FAILED)
                    again = await read_until(service.stub.Generate(request(1)), pb.PHASE_FAILED)
        assert (ended.error.code, ended.error.reason) == (grpc.StatusCode.INTERNAL.value[0], "ENGINE_CRASHED")
        assert (again.generation_id, again.error.reason) == (generation_id, "ENGINE_CRASHED")
        reports += [line for line in logs if line["log_level"] == "error"]
    assert not engine.jobs
    assert [(line["generation"], line["attempts"]) for line in reports] == [(generation_id, 2)]
    assert "a red apple" not in str(reports)


async def test_a_second_crash_does_not_count_against_bystanders(tmp_path: Path) -> None:
    """Three ran when the process crashed; afterwards only one of them runs at a time, so only one can be blamed."""
    engine = FakeEngine()
    engine.hold()
    async with opened(tmp_path / "0") as store, running(engine, store=store, max_active=3) as service:
        await start_held(service, 1, 2, 3)
        await at_step(engine, 3)
        folder = crashed(tmp_path / "0", tmp_path / "1")
    assert await attempts(folder) == {1: 1, 2: 1, 3: 1}
    engine = FakeEngine()
    engine.hold()
    async with opened(folder) as store, running(engine, store=store, max_active=3) as service:
        await at_step(engine)
        folder = crashed(folder, tmp_path / "2")
        assert await attempts(folder) == {1: 2, 2: 1, 3: 1}
    engine = FakeEngine()
    async with opened(folder) as store, running(engine, store=store, max_active=3) as service:
        await service.generations.idle()
    assert [job.seed for job in engine.jobs] == [2, 3]
    assert engine.most_active == 1
    assert await attempts(folder) == {}


POISONED = """
import asyncio, os, signal, sys
from calotype_server.apps.server import serve
from calotype_server.settings import Settings
from support.engine.fake_engine import FakeEngine

class Poisoned(FakeEngine):
    def _run(self, job, report, stop):
        if job.prompt == "poison":
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._run(job, report, stop)

async def load(settings, observe):
    return Poisoned()

def announce(ready):
    print(ready.address, flush=True)

asyncio.run(serve(Settings(grpc_address="127.0.0.1:0", web_address="127.0.0.1:0", state=sys.argv[1]), announce, load))
"""


@pytest.mark.slow
async def test_a_request_that_kills_the_process_does_not_cause_a_crash_loop(tmp_path: Path) -> None:
    """The process is killed twice; the third one serves, and makes the image of another caller."""

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", POISONED, str(tmp_path)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": "tests", "PATH": ""})

    with start() as first:
        async with open_channel((await asyncio.to_thread(first.stdout.readline)).strip()) as channel:
            call = GenerationServiceStub(channel).Generate(
                pb.GenerateRequest(prompt="poison", on_disconnect=KEEP, request_id="p")
            )
            with pytest.raises(grpc.aio.AioRpcError):
                await read_until(call, pb.PHASE_SUCCEEDED)
        assert await asyncio.to_thread(first.wait) == -signal.SIGKILL
    with start() as second:
        assert await asyncio.to_thread(second.wait) == -signal.SIGKILL
    with start() as third:
        try:
            async with open_channel((await asyncio.to_thread(third.stdout.readline)).strip()) as channel:
                stub = GenerationServiceStub(channel)
                again = stub.Generate(pb.GenerateRequest(prompt="poison", on_disconnect=KEEP, request_id="p"))
                assert (await read_until(again, pb.PHASE_FAILED)).error.reason == "ENGINE_CRASHED"
                await read_until(stub.Generate(pb.GenerateRequest(prompt="an apple")), pb.PHASE_SUCCEEDED)
        finally:
            third.terminate()
