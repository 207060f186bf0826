"""Slow and stalled HTTP readers: they skip previews, receive the end, and are dropped after the stall timeout."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from starlette.applications import Starlette

from calotype_server.auth.access import Access, Caller
from calotype_server.errors import StateUnavailable
from calotype_server.transport.http import HttpApi
from calotype_server.transport.net.call_limits import CallLimiter
from calotype_server.types import PortLimits
from support.asgi import Peer
from support.engine.fake_engine import FakeEngine
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


def open_peer(service: Service, way: str, stall_seconds: float = 20.0) -> Peer:
    """Starts a generation and returns its reader."""
    application = site(service, stall_seconds)
    if way == "sse":
        return Peer(application, "http", "/v1/generate", body=json.dumps(REQUEST).encode())
    peer = Peer(application, "websocket", "/v1/ws")
    peer.give({"type": "websocket.receive", "text": json.dumps({"type": "generate", "id": "a", "request": REQUEST})})
    return peer


def messages(peer: Peer) -> list[Any]:
    """Returns the messages that a peer has received."""
    received = []
    for event in peer.taken:
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
        peer = open_peer(service, way)
        await until(lambda: any(message.phase == 3 for message in messages(peer)))
        peer.reading.clear()
        engine.allow(1)
        await peer.waiting.wait()
        before = len(messages(peer))
        engine.allow()
        await until(lambda: service.generations.newest(Caller("ipv4:127.0.0.1"))[0].ended)
        peer.reading.set()
        await until(lambda: messages(peer)[-1].phase >= 5)
        received = messages(peer)[before:]
        peer.leave()
        await peer.done
    assert len(received) <= 2
    assert received[-1].previews_dropped >= STEPS - 2
    assert received[-1].chunk_count == 1


@pytest.mark.parametrize("way", WAYS)
async def test_a_stalled_reader_is_dropped(way: str) -> None:
    """After the stall timeout it counts as disconnected: its generation is cancelled before the next step."""
    engine = FakeEngine()
    engine.hold()
    async with running(engine) as service:
        peer = open_peer(service, way, stall_seconds=0.05)
        await until(lambda: any(message.phase == 3 for message in messages(peer)))
        peer.reading.clear()
        engine.allow(1)
        await until(lambda: engine.stops[0].is_set())
        if way == "sse":
            await peer.done
        peer.leave()
        await peer.done
        engine.allow()
        await service.generations.idle()


async def test_a_disconnect_before_the_response_starts_cancels() -> None:
    """A generation whose client never read a byte is cancelled when that client disconnects."""
    engine = FakeEngine()
    engine.hold()
    async with running(engine) as service:
        application = site(service)
        peer = Peer(application, "http", "/v1/generate", body=json.dumps(REQUEST).encode())
        peer.reading.clear()
        peer.leave()
        await until(lambda: bool(engine.stops))
        await until(lambda: peer.waiting.is_set())
        peer.done.cancel()
        await until(lambda: engine.stops[0].is_set())
        engine.allow()
        await service.generations.idle()


async def test_an_error_after_the_status_becomes_an_event() -> None:
    """A watcher whose response has started receives an `error` event, and the stream ends."""
    engine = FakeEngine()
    engine.hold()
    async with running(engine) as service:
        peer = open_peer(service, "sse")
        await until(lambda: bool(messages(peer)))
        generation = service.generations.newest(Caller("ipv4:127.0.0.1"))[0]

        async def lost() -> None:
            raise StateUnavailable("It cannot be kept.")

        generation.accepted = lost
        watcher = Peer(site(service), "http", f"/v1/generations/{generation.id}/events", method="GET")
        await watcher.done
        engine.allow()
        await until(lambda: messages(peer)[-1].phase >= 5)
        await peer.done
    text = b"".join(event.get("body", b"") for event in watcher.taken).decode()
    assert text.startswith("event: error\n")
    assert '"code":"STATE_UNAVAILABLE"' in text
    assert [event["type"] for event in watcher.taken].count("http.response.start") == 1
