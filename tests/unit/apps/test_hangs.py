"""A server whose disk, encoder or engine hangs: callers, probes, metrics and SIGTERM, in this process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from functools import partial
from typing import TYPE_CHECKING

import grpc
import pytest

from calotype.v1 import calotype_pb2 as pb
from calotype_server import threads
from calotype_server.apps import health, runtime
from calotype_server.errors import ModelUnavailable
from calotype_server.failpoints import injected
from calotype_server.generations import lifecycle
from calotype_server.generations.watchdog import EXIT_STALLED
from support.hangs.frozen_disk import FrozenDisk
from support.hangs.whole_server import NOT_SERVING, PATIENCE, SERVING, Server
from support.service import read_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

PROMPT = pb.GenerateRequest(prompt="a red apple")
BRIEF = 0.05
"""An interval between checks, or a limit for threads that hang, in seconds."""

TIMEOUT = 1.0
"""Timeout of disk and encoder, in seconds: more than a call takes that does not hang."""


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """A lock that hangs until it is set; it is set at the end of the test, so that no thread is left."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Server:
    """A server in this process, whose limits are short."""
    monkeypatch.setattr(health, "_INTERVAL_SECONDS", BRIEF)
    monkeypatch.setattr(lifecycle, "_ABORT_SECONDS", BRIEF)
    monkeypatch.setattr(lifecycle, "_DISK_SECONDS", BRIEF)
    monkeypatch.setattr(runtime, "_JOIN_SECONDS", BRIEF)
    monkeypatch.setattr(runtime, "_PROBE_SECONDS", BRIEF)
    return Server(monkeypatch, tmp_path)


@contextlib.asynccontextmanager
async def ready(server: Server, folder: Path | None = None) -> AsyncIterator[None]:
    """Runs a server that is ready."""
    settings = {} if folder is None else {"state": folder, "state_timeout_seconds": TIMEOUT}
    async with server.running(encode_timeout_seconds=TIMEOUT, drain_seconds=0, **settings):
        server.loaded.set()
        await asyncio.wait_for(server.ready(), PATIENCE)
        yield


async def exit_code(server: Server) -> int:
    """Sends SIGTERM and returns the exit code."""
    os.kill(os.getpid(), signal.SIGTERM)
    return await asyncio.wait_for(server.serving, PATIENCE)


async def test_a_disk_that_hangs(server: Server, tmp_path: Path) -> None:
    """New calls fail, running generations succeed, no probe is ready, and all recovers when the disk responds."""
    disk = FrozenDisk()
    async with ready(server, tmp_path):
        watch = await server.watch()
        server.engine.hold()
        running = server.stub.Generate(PROMPT)
        await running.read()
        with disk.frozen():
            # Without any call: the server probes its disk.
            assert (await watch.read()).status == NOT_SERVING
            assert await server.probes() == ({NOT_SERVING}, 200, 503, 0)
            assert await server.metric("calotype_state_problem") == 1
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await server.stub.Generate(PROMPT).read()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            server.engine.allow()
            assert (await read_until(running, pb.PHASE_SUCCEEDED)).image
        assert (await watch.read()).status == SERVING
        assert await server.probes() == ({SERVING}, 200, 200, 1)
        assert await server.metric("calotype_state_problem") == 0
        assert await read_until(server.stub.Generate(PROMPT), pb.PHASE_SUCCEEDED)
        watch.cancel()


async def test_sigterm_while_the_disk_hangs(server: Server, tmp_path: Path) -> None:
    """The running generation ends with DRAINING, and the server stops with code 70."""
    disk = FrozenDisk()
    async with ready(server, tmp_path):
        server.engine.hold()
        running = server.stub.Generate(PROMPT)
        await running.read()
        with disk.frozen():
            assert await asyncio.to_thread(disk.hangs.acquire, timeout=PATIENCE)
            assert await exit_code(server) == EXIT_STALLED
            assert (await read_until(running, pb.PHASE_FAILED)).error.reason == "DRAINING"


async def test_sigterm_while_the_disk_is_full(server: Server, tmp_path: Path) -> None:
    """No probe is ready, but nothing hangs, so the server stops with code 0."""

    def full() -> None:
        raise OSError(28, "No space left on device")

    async with ready(server, tmp_path):
        watch = await server.watch()
        with injected("store.accept", full):
            with pytest.raises(grpc.aio.AioRpcError):
                await server.stub.Generate(PROMPT).read()
            assert (await watch.read()).status == NOT_SERVING
            assert await exit_code(server) == 0


async def test_sigterm_while_the_disk_hangs_at_the_start(server: Server, tmp_path: Path) -> None:
    """The probes have answers before the state is open, and a signal stops the server."""
    disk = FrozenDisk()
    with disk.frozen():
        async with server.running(state=tmp_path):
            assert await asyncio.to_thread(disk.hangs.acquire, timeout=PATIENCE)
            assert await server.probes() == ({NOT_SERVING}, 200, 503, 0)
            assert await exit_code(server) == 0


async def test_an_encoder_that_hangs(server: Server, gate: threading.Event) -> None:
    """Its generation fails, no probe is ready until the thread returns, and the next generation succeeds."""
    async with ready(server):
        watch = await server.watch()
        with injected("encoder.final", gate.wait):
            assert (await read_until(server.stub.Generate(PROMPT), pb.PHASE_FAILED)).error.reason == "GENERATION_FAILED"
            assert (await watch.read()).status == NOT_SERVING
            assert await server.metric("calotype_encoder_hung_threads") == 1
        gate.set()
        assert (await watch.read()).status == SERVING
        assert await read_until(server.stub.Generate(PROMPT), pb.PHASE_SUCCEEDED)
        watch.cancel()


async def test_too_many_encoder_threads_that_hang(
    server: Server, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The generation fails, and the server stops with code 70, so that a supervisor restarts it."""
    monkeypatch.setattr(threads, "Pool", partial(threads.Pool, max_hung=1))
    async with ready(server):
        with injected("encoder.final", gate.wait):
            assert (await read_until(server.stub.Generate(PROMPT), pb.PHASE_FAILED)).error.reason == "GENERATION_FAILED"
            assert await asyncio.wait_for(server.serving, PATIENCE) == EXIT_STALLED


@pytest.mark.parametrize("place", ["engine.run", "engine.step", "engine.report"])
@pytest.mark.parametrize("signals", [1, 2])
async def test_sigterm_while_the_engine_hangs(server: Server, gate: threading.Event, place: str, signals: int) -> None:
    """Callers get DRAINING, and the server stops with code 70 although a thread still hangs."""
    entered = threading.Event()
    async with ready(server):
        with injected(place, lambda: (entered.set(), gate.wait())):
            running = server.stub.Generate(PROMPT)
            await running.read()
            assert await asyncio.to_thread(entered.wait, PATIENCE)
            for _ in range(signals - 1):
                os.kill(os.getpid(), signal.SIGTERM)
            assert await exit_code(server) == EXIT_STALLED
            assert (await read_until(running, pb.PHASE_FAILED)).error.reason == "DRAINING"
        gate.set()


async def test_every_signal_limits_the_time_of_the_stop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first signal allows the drain and 25 s, the second one 25 s; then the process would end with code 70."""
    server = Server(monkeypatch, tmp_path)
    async with server.running(drain_seconds=100):
        server.loaded.set()
        await asyncio.wait_for(server.ready(), PATIENCE)
        server.engine.hold()
        running = server.stub.Generate(PROMPT)
        await read_until(running, pb.PHASE_DENOISING)
        os.kill(os.getpid(), signal.SIGTERM)
        assert await server.limits.get() == (125.0, EXIT_STALLED)
        assert not server.serving.done()
        os.kill(os.getpid(), signal.SIGTERM)
        assert await server.limits.get() == (25.0, EXIT_STALLED)
        assert await asyncio.to_thread(server.engine.stops[-1].wait, PATIENCE)
        server.engine.allow()
        assert (await read_until(running, pb.PHASE_FAILED)).error.reason == "DRAINING"
        assert await asyncio.wait_for(server.serving, PATIENCE) == 0


async def test_a_warm_up_that_hangs_ends_the_process(
    server: Server, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watchdog also covers the first images, which have ten times as long."""
    exits: asyncio.Queue[int] = asyncio.Queue()
    monkeypatch.setattr("os._exit", exits.put_nowait)
    # A real process does not get any further. Here, the start fails, or the signal at the end of the block stops it.
    with injected("engine.run", gate.wait), contextlib.suppress(ModelUnavailable):
        async with server.running(watchdog_seconds=0.01):
            server.loaded.set()
            assert await asyncio.wait_for(exits.get(), PATIENCE) == EXIT_STALLED
            gate.set()
            await asyncio.wait({server.serving}, timeout=PATIENCE)
