"""A GET stream never makes a browser's EventSource give up while a retry helps."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from calotype.v1 import calotype_pb2 as pb
from calotype_server import errors
from calotype_server.generations.store import Store
from calotype_server.transport.net.call_limits import CallLimiter
from support.engine.fake_engine import FakeEngine
from support.http import ReconnectingEvents
from support.keyring import Keyring
from support.lab import until
from support.service import Service, read_until, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

APPLE = {"prompt": "a red apple", "seed": 7}


async def nothing() -> None:
    """Reconnects at once."""


def names(received: list[Any]) -> list[str]:
    """Returns the names of events, without repetitions in a row."""
    found = [event.event for event in received]
    return [name for index, name in enumerate(found) if index == 0 or found[index - 1] != name]


def assert_complete(received: list[Any]) -> None:
    """Checks that one generation arrived from its start to its image, without gaps, repetitions or two ends."""
    messages = [json.loads(event.data) for event in received if event.event != "waiting"]
    assert len({message["generation_id"] for message in messages}) == 1
    sequences = [int(message.get("sequence", 0)) for message in messages]
    assert sequences == sorted(set(sequences))
    assert [message["phase"] for message in messages].count("PHASE_SUCCEEDED") == 1
    assert messages[-1]["image"]


async def test_it_waits_while_the_model_loads() -> None:
    """It gets the reason and the delay instead of 503, and the image after the server is ready."""
    engine = FakeEngine()
    async with running(engine, transport="sse", opened=False) as service:

        async def load() -> None:
            service.api.open(service.generations)

        source = ReconnectingEvents(service.stub.client, "/generate", load, **APPLE)
        received = [event async for event in source]
    assert source.statuses == [200, 200, 204]
    assert names(received) == ["waiting", "progress", "end"]
    assert (received[0].retry, json.loads(received[0].data)["error"]["code"]) == (2000, "NOT_READY")
    assert not received[0].id
    assert_complete(received)
    assert len(engine.jobs) == 1


async def queue_full(service: Service) -> None:
    """Fills the slot and the queue."""
    for seed in (1, 2):
        call = service.stub.Generate(
            pb.GenerateRequest(prompt="a cat", seed=seed, on_disconnect=pb.DISCONNECT_POLICY_KEEP)
        )
        await read_until(call, pb.PHASE_QUEUED)
        call.cancel()


async def draining(service: Service) -> None:
    """Stops accepting generations."""
    service.generations.reject_new(retry_after=5.0)


async def too_many_calls(service: Service) -> Any:
    """Occupies the only call of this host, and returns it."""
    call = service.stub.Generate(pb.GenerateRequest(prompt="a cat"))
    await read_until(call, pb.PHASE_QUEUED)
    return call


@pytest.mark.parametrize(
    ("occupy", "code", "status"),
    [(queue_full, "QUEUE_FULL", 429), (draining, "DRAINING", 503), (too_many_calls, "TOO_MANY_CALLS", 429)],
)
async def test_it_comes_back_while_a_retry_helps(occupy: Callable[..., Any], code: str, status: int) -> None:
    """An EventSource gets 200 with the reason; a POST and a plain GET keep their status and `Retry-After`."""
    limiter = CallLimiter(1) if occupy is too_many_calls else None
    async with running(FakeEngine(), transport="sse", max_queue=1, call_limiter=limiter) as service:
        client = service.stub.client
        service.engine.hold()
        occupied = await occupy(service)
        answer = await client.get("/generate", params=APPLE, headers={"accept": "text/event-stream"})
        assert (answer.status_code, answer.headers["content-type"].partition(";")[0]) == (200, "text/event-stream")
        lines = dict(line.split(": ", 1) for line in answer.text.splitlines() if line)
        assert lines["event"] == "waiting"
        assert int(lines["retry"]) >= 1000
        assert json.loads(lines["data"])["error"]["code"] == code
        for plain in (await client.post("/generate", json=APPLE), await client.get("/generate", params=APPLE)):
            assert (plain.status_code, "retry-after" in plain.headers) == (status, True)
        if occupied is not None:
            occupied.cancel()
        service.engine.allow()


@pytest.mark.parametrize(
    ("path", "params", "key", "status"),
    [
        ("/generate", {"width_px": "63"}, True, 400),
        ("/generate", APPLE, False, 401),
        ("/generations/unknown/events", {}, True, 404),
    ],
)
async def test_errors_that_no_retry_fixes_stop_it(
    path: str, params: dict[str, Any], key: bool, status: int, tmp_path: Path
) -> None:
    """These keep their status, so it does not repeat the request, and their JSON, which `fetch` can read."""
    keyring = Keyring(tmp_path / "keys.toml")
    keyring.add("alice")
    async with running(FakeEngine(), transport="sse", access=keyring.access()) as service:
        headers = dict(keyring.metadata("alice")) if key else {}
        headers["accept"] = "text/event-stream"
        answer = await service.stub.client.get(path, params=params, headers=headers)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json")
    assert answer.json()["error"]["message"]


async def test_nothing_is_lost_or_repeated_over_many_connections() -> None:
    """The connection is lost after every event, and at the end the server stops the EventSource."""
    engine = FakeEngine()
    engine.hold()
    async with running(engine, transport="sse") as service:
        received = []

        async def step() -> None:
            engine.allow(1)

        source = ReconnectingEvents(service.stub.client, "/generate", step, **APPLE, step_count=6)
        while not source.statuses or source.statuses[-1] == 200:
            async for event in connection(source):
                received.append(event)
                break
            await step()
    assert source.statuses[-1] == 204
    assert len(source.statuses) > 3
    assert_complete(received)
    assert len(engine.jobs) == 1


@contextlib.asynccontextmanager
async def _closing(events: Any) -> AsyncIterator[Any]:
    try:
        yield events
    finally:
        await events.aclose()


async def connection(source: ReconnectingEvents) -> AsyncIterator[Any]:
    """Yields the events of one connection, and drops it when the caller stops reading."""
    async with _closing(source.__aiter__()) as events:
        async for event in events:
            yield event


async def test_an_end_with_the_same_number_as_the_last_event_is_delivered() -> None:
    """A log that was lost and restarted may end with any number, so only the id of an end stops an EventSource."""
    async with running(FakeEngine(), transport="sse") as service:
        client = service.stub.client
        ended = await read_until(service.stub.Generate(pb.GenerateRequest(prompt="a cat")), pb.PHASE_SUCCEEDED)
        path = f"/generations/{ended.generation_id}/events"
        seen = {"last-event-id": f"{ended.generation_id}:{ended.sequence}"}
        assert "event: end" in (await client.get(path, headers=seen)).text
        stopped = await client.get(path, headers={"last-event-id": f"{ended.generation_id}:end"})
        assert stopped.status_code == 204


async def abandoned(service: Service) -> None:
    """Waits until the server has cancelled the only generation, because its reader left."""
    assert await asyncio.to_thread(service.engine.at_step.acquire, timeout=20)
    assert await asyncio.to_thread(service.engine.stops[0].wait, 20)
    service.engine.allow()
    await until(lambda: not service.generations.running)


@pytest.mark.parametrize("stored", [True, False])
async def test_it_survives_a_restart_of_the_server(stored: bool, tmp_path: Path) -> None:
    """With a state folder the generation continues; otherwise the same request starts again. Either way, one image."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(engine: FakeEngine) -> Service:
            store = await Store.open(tmp_path) if stored else None
            if store is not None:
                stack.push_async_callback(store.close)
            return await stack.enter_async_context(running(engine, transport="sse", store=store))

        engine = FakeEngine()
        engine.hold()
        service = await start(engine)

        async def restart() -> None:
            if len(source.statuses) == 1:
                await stack.aclose()
                source.client = (await start(FakeEngine())).stub.client

        source = ReconnectingEvents(service.stub.client, "/generate", restart, **APPLE)
        received: list[Any] = []
        async for event in source:
            received.append(event)
            if len(received) == 1:
                for generation in service.generations.running:
                    generation.abort(errors.Draining("The server is stopping.", retry_after=5.0))
                engine.allow()
    # A restored generation may end before the EventSource is back.
    assert names(received) in (["progress", "waiting", "progress", "end"], ["progress", "waiting", "end"])
    assert (source.statuses, json.loads(received[-1].data)["seed"]) == ([200, 200, 204], "7")
    ids = {json.loads(event.data)["generation_id"] for event in received if event.event != "waiting"}
    assert len(ids) == (1 if stored else 2)


async def test_it_starts_again_when_it_was_away_for_too_long() -> None:
    """A generation that was cancelled because its reader did not come back within the grace starts again."""
    engine = FakeEngine()
    engine.hold()
    async with running(engine, transport="sse") as service:
        source = ReconnectingEvents(service.stub.client, "/generate", nothing, **APPLE, disconnect_grace="0s")
        async for _ in connection(source):
            break
        await abandoned(service)
        received = [event async for event in source]
    assert source.statuses == [200, 200, 204]
    assert names(received) == ["progress", "end"]
    assert json.loads(received[-1].data)["phase"] == "PHASE_SUCCEEDED"


async def test_a_watched_generation_that_was_abandoned_ends() -> None:
    """A generation that will not continue sends its end, so that an EventSource does not wait for it forever."""
    engine = FakeEngine()
    engine.hold()
    async with running(engine, transport="sse") as service:
        call = service.stub.Generate(pb.GenerateRequest(prompt="a cat"))
        started = await call.read()
        call.cancel()
        await abandoned(service)
        path = f"/generations/{started.generation_id}/events"
        source = ReconnectingEvents(service.stub.client, path, nothing)
        received = [event async for event in source]
    assert names(received) == ["end"]
    assert json.loads(received[0].data)["error"]["reason"] == "ABANDONED"
    assert source.statuses == [200, 204]
