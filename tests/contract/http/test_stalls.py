"""Slow and stalled HTTP readers: they skip previews, receive the end, and are dropped after the stall timeout."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from starlette.applications import Starlette

from calotype_server.auth.access import Access, Caller
from calotype_server.errors import StateUnavailable
from calotype_server.failpoints import injected
from calotype_server.limits import PortLimits
from calotype_server.transport.http import HttpApi
from calotype_server.transport.net.call_limits import CallLimiter
from support.asgi import AsgiClient
from support.engine.fake_engine import FakeEngine
from support.faults import Panic
from support.http import from_json
from support.lab import until
from support.service import running

if TYPE_CHECKING:
    from support.service import Service

WAYS = ("sse", "websocket")
STEPS = 20
REQUEST = {"prompt": "a red apple", "seed": 7, "step_count": STEPS}


def site(service: Service, stall_seconds: float = 20.0) -> Starlette:
    """Returns the HTTP API as an app without a port."""
    limits = PortLimits(stall_seconds=stall_seconds)
    return Starlette(routes=HttpApi(service.api, Access(), limits, CallLimiter(9)).routes)


def open_client(service: Service, way: str, stall_seconds: float = 20.0) -> AsgiClient:
    """Starts a generation and returns its reader."""
    application = site(service, stall_seconds)
    if way == "sse":
        return AsgiClient(application, "http", "/v1/generate", body=json.dumps(REQUEST).encode())
    client = AsgiClient(application, "websocket", "/v1/ws")
    client.push({"type": "websocket.receive", "text": json.dumps({"type": "generate", "id": "a", "request": REQUEST})})
    return client


def messages(client: AsgiClient) -> list[Any]:
    """Returns the messages that a client has received."""
    received = []
    for event in client.received:
        if event["type"] == "http.response.body":
            lines = [line for line in event["body"].decode().splitlines() if line.startswith("data: ")]
            received += [json.loads(line.removeprefix("data: ")) for line in lines]
        elif event["type"] == "websocket.send" and event.get("text"):
            received.append(json.loads(event["text"])["progress"])
    return [from_json(each) for each in received]


@pytest.mark.parametrize("way", WAYS)
async def test_a_slow_reader_skips_to_the_newest_preview_and_the_end(way: str) -> None:
    """A reader that pauses during all steps receives at most one old message, and the end with the skipped count."""
    engine = FakeEngine()
    engine.hold()
    async with running(engine) as service:
        client = open_client(service, way)
        await until(lambda: any(message.phase == 3 for message in messages(client)))
        client.reading.clear()
        engine.allow(1)
        await client.waiting.wait()
        before = len(messages(client))
        engine.allow()
        await until(lambda: service.generations.newest(Caller("ipv4:127.0.0.1"))[0].ended)
        client.reading.set()
        await until(lambda: messages(client)[-1].phase >= 5)
        received = messages(client)[before:]
        client.disconnect()
        await client.done
    assert len(received) <= 2
    assert received[-1].previews_dropped >= STEPS - 2
    assert received[-1].chunk_count == 1


@pytest.mark.parametrize("way", WAYS)
async def test_a_stalled_reader_is_dropped(way: str) -> None:
    """After the stall timeout it counts as disconnected: its generation is cancelled before the next step."""
    engine = FakeEngine()
    engine.hold()
    async with running(engine) as service:
        client = open_client(service, way, stall_seconds=0.05)
        await until(lambda: any(message.phase == 3 for message in messages(client)))
        client.reading.clear()
        engine.allow(1)
        await until(lambda: engine.stops[0].is_set())
        if way == "sse":
            await client.done
        client.disconnect()
        await client.done
        engine.allow()
        await service.generations.idle()


async def test_a_disconnect_before_the_response_starts_cancels() -> None:
    """A generation whose client never read a byte is cancelled when that client disconnects."""
    engine = FakeEngine()
    engine.hold()
    async with running(engine) as service:
        application = site(service)
        client = AsgiClient(application, "http", "/v1/generate", body=json.dumps(REQUEST).encode())
        client.reading.clear()
        client.disconnect()
        await until(lambda: bool(engine.stops))
        await until(lambda: client.waiting.is_set())
        client.done.cancel()
        await until(lambda: engine.stops[0].is_set())
        engine.allow()
        await service.generations.idle()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (StateUnavailable("The disk is gone."), "STATE_UNAVAILABLE"),
        (RuntimeError("a secret"), "GENERATION_FAILED"),
        (Panic("a secret"), "GENERATION_FAILED"),
    ],
    ids=["typed", "unexpected", "panic"],
)
async def test_an_error_after_the_status_becomes_an_event(error: BaseException, reason: str) -> None:
    """A watcher whose response has started receives an `error` event without internal details, and the stream ends."""

    def fail() -> None:
        raise error

    engine = FakeEngine()
    engine.hold()
    async with running(engine) as service:
        client = open_client(service, "sse")
        await until(lambda: bool(messages(client)))
        generation = service.generations.newest(Caller("ipv4:127.0.0.1"))[0]
        watcher = AsgiClient(site(service), "http", f"/v1/generations/{generation.id}/events", method="GET")
        await until(lambda: bool(messages(watcher)))
        with injected("http.message", fail):
            engine.allow()
            await watcher.done
            await client.done
    text = b"".join(event.get("body", b"") for event in watcher.received).decode()
    assert "\nevent: error\n" in text
    assert f'"code":"{reason}"' in text
    assert "secret" not in text
    assert [event["type"] for event in watcher.received].count("http.response.start") == 1
