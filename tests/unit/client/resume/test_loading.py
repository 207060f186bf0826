"""Servers that load their model, over real sockets, with both clients."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, Any

import pytest

from calotype import AsyncClient, Client, ClientClosed, DeadlineExceeded, NotFound, Unavailable
from calotype.testing import FakeServer

if TYPE_CHECKING:
    from collections.abc import Callable

CALLS = 12
"""More answers of a loading server than the clients of these tests have attempts."""

FOREVER = 10**9

USES: dict[str, Callable[[Any], Any]] = {
    "generate": lambda client: client.generate("a red apple").result(),
    "watch": lambda client: client.watch("fake-1").result(),
    "model": lambda client: client.model(),
    "cancel": lambda client: client.cancel("fake-1"),
    "finish": lambda client: client.finish("fake-1"),
    "generations": lambda client: anext(client.generations(), None) if is_async(client) else [*client.generations()],
}
"""Every kind of call."""

ONCE_READY = {name: pytest.raises(NotFound) for name in ("watch", "cancel", "finish")}
"""The answer of a server without a generation, once it is ready."""


def is_async(client: Client | AsyncClient) -> bool:
    """Returns whether this is the asyncio client."""
    return isinstance(client, AsyncClient)


async def test_a_stream_survives_a_server_that_loads_for_long_after_a_restart(without_waits):
    """The loop continues although a restarted server answers more often that it is loading than `retries` allows."""

    def restart(server, progress):
        if progress.step == 2 and len(server.requests) == 1:
            server.restart(loading_calls=CALLS)
            server.release()

    with FakeServer(steps=4, hold_at=2) as server, without_waits(Client(server.address), retries=3) as client:
        for progress in client.generate("a red apple", seed=5):
            restart(server, progress)
        assert (progress.step, len(server.requests)) == (4, 2)
    with FakeServer(steps=4, hold_at=2) as server:
        async with without_waits(AsyncClient(server.address), retries=3) as client:
            async for progress in client.generate("a red apple", seed=5):
                restart(server, progress)
            assert (progress.step, len(server.requests)) == (4, 2)


@pytest.mark.parametrize("name", USES)
async def test_the_first_call_waits_while_the_server_loads(without_waits, name):
    """Each kind of call waits for a loading server as the first call of a client, and reports each wait."""
    reasons = []

    def client_of(kind, server):
        def note(error, _):
            reasons.append(error.reason)

        return without_waits(kind(server.address, on_reconnect=note), retries=3)

    once_ready = ONCE_READY.get(name, contextlib.nullcontext())
    with FakeServer(loading_calls=CALLS) as server, client_of(Client, server) as client, once_ready:
        USES[name](client)
    assert reasons == ["NOT_READY"] * CALLS
    with FakeServer(loading_calls=CALLS) as server, once_ready:
        async with client_of(AsyncClient, server) as client:
            await USES[name](client)
    assert reasons == ["NOT_READY"] * CALLS * 2


@pytest.mark.parametrize("name", USES)
async def test_a_loading_server_is_an_error_if_the_caller_wants_that(name):
    """With a loading timeout of 0, or without retries, each kind of call raises NOT_READY at once."""
    with FakeServer(loading_calls=FOREVER) as server:
        choices: list[dict[str, Any]] = [{"loading_timeout": 0}, {"retries": 0}]
        for options in choices:
            with Client(server.address, **options) as client, pytest.raises(Unavailable) as caught:
                USES[name](client)
            assert caught.value.reason == "NOT_READY"
            async with AsyncClient(server.address, **options) as client:
                with pytest.raises(Unavailable):
                    await USES[name](client)


async def test_the_timeout_ends_the_wait_for_a_loading_server():
    """A server that never finishes loading ends the call with DeadlineExceeded at the timeout, which says why."""
    with FakeServer(loading_calls=FOREVER) as server:
        with (
            Client(server.address) as client,
            pytest.raises(DeadlineExceeded, match="waiting for the server: The model"),
        ):
            client.generate("a red apple", timeout=0.3).result()
        async with AsyncClient(server.address, timeout=0.3) as client:
            with pytest.raises(DeadlineExceeded, match="waiting for the server: The model is still loading"):
                await client.generate("a red apple").result()


async def test_closing_a_client_ends_its_waits_for_a_loading_server(without_waits):
    """close() wakes a thread or a task that waits in `model` for a loading server."""
    hours: dict[str, Any] = {"random": lambda: 1.0, "base": 7200.0, "cap": 7200.0}
    waiting = threading.Event()

    def note(*_):
        waiting.set()

    with FakeServer(loading_calls=FOREVER) as server:
        client = without_waits(Client(server.address, on_reconnect=note), **hours)
        call = asyncio.get_running_loop().run_in_executor(None, client.model)
        await asyncio.to_thread(waiting.wait, 10)
        client.close()
        with pytest.raises(ClientClosed):
            await call
        noted = asyncio.Event()
        async with without_waits(AsyncClient(server.address, on_reconnect=lambda *_: noted.set()), **hours) as other:
            task = asyncio.create_task(other.model())
            await noted.wait()
            await other.aclose()
            with pytest.raises(ClientClosed):
                await task


async def test_a_ready_server_is_used_while_another_one_loads():
    """With several servers, calls go to the one that is ready, after short waits at most."""
    with FakeServer(loading_calls=FOREVER) as loading, FakeServer() as ready:
        address, waits = f"ipv4:{loading.address},{ready.address}", []
        with Client(address, on_reconnect=lambda _, delay: waits.append(delay)) as client:
            for _ in range(4):
                assert client.generate("a red apple").result().format == "png"
        async with AsyncClient(address) as client:
            assert (await client.generate("a red apple").result()).format == "png"
        assert len(ready.requests) == 5
        # gRPC may choose the loading server several times before it notices its health.
        assert max(waits, default=0.0) <= 1.0


async def test_a_server_that_was_just_started_is_waited_for(without_waits):
    """With wait_for_server, a call waits for a port that opens later; without, it raises at once."""
    with FakeServer() as server:
        server.stop()

        def start(error, _):
            if not error.reason:
                server.restart(loading_calls=2)

        with Client(server.address) as client, pytest.raises(Unavailable):
            client.model()
        with without_waits(Client(server.address, on_reconnect=start), wait_for_server=60.0) as client:
            assert client.generate("a red apple").result().format == "png"


async def test_a_list_of_several_servers_waits_while_all_of_them_load(without_waits):
    """While every server loads, `generations` waits."""
    with FakeServer(loading_calls=6) as one, FakeServer(loading_calls=6) as other:
        address = f"ipv4:{one.address},{other.address}"
        with without_waits(Client(address)) as client:
            assert list(client.generations()) == []
        one.restart(loading_calls=6)
        other.restart(loading_calls=6)
        async with without_waits(AsyncClient(address)) as client:
            assert [each async for each in client.generations()] == []
