"""Server-sent events: the behaviour that EventSource and `curl -N` need, beyond that of every transport."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import TYPE_CHECKING

import pytest
from httpx_sse import EventSource

from calotype.v1 import calotype_pb2 as pb
from calotype_server.auth.access import Caller
from calotype_server.transport.http import sse
from support.engine.fake_engine import FakeEngine
from support.lab import until
from support.service import running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx

    from support.service import Service

APPLE = {"prompt": "a red apple", "seed": 7}


@pytest.fixture
def engine() -> FakeEngine:
    """An engine whose steps the test releases."""
    engine = FakeEngine()
    engine.hold()
    return engine


@pytest.fixture
async def service(engine: FakeEngine) -> AsyncIterator[Service]:
    """A server with that engine."""
    async with running(engine, transport="sse") as service:
        yield service


@pytest.fixture
def client(service: Service) -> httpx.AsyncClient:
    """An HTTP client of the server."""
    return service.stub.client


async def read_to(events, step: int):
    """Reads until the first event of a step and returns it."""
    async for event in events:
        if json.loads(event.data).get("step", 0) >= step:
            return event
    raise AssertionError


async def rest(events) -> list:
    """Returns the remaining events of a stream."""
    return [event async for event in events]


@pytest.mark.proves("sse", "streams")
async def test_headers_and_ids_suit_browsers_and_proxies(client, engine: FakeEngine) -> None:
    """The stream has the right type, is not cached or buffered, and has increasing ids and a reconnect delay."""
    engine.allow()
    async with client.stream("GET", "/generate", params=APPLE) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["x-accel-buffering"] == "no"
        assert response.headers["x-request-id"]
        received = await rest(EventSource(response).aiter_sse())
    assert {event.event for event in received[:-1]} == {"progress"}
    assert received[-1].event == "end"
    assert received[0].retry == 1000
    sequences = [int(event.id.partition(":")[2]) for event in received[:-1]]
    assert sequences == sorted(set(sequences))
    assert received[-1].id == f"{received[0].id.partition(':')[0]}:end"
    last = json.loads(received[-1].data)
    assert (last["phase"], last["seed"]) == ("PHASE_SUCCEEDED", "7")
    assert base64.b64decode(last["image"]).startswith(b"\x89PNG")


@pytest.mark.proves("sse", "resumes")
async def test_last_event_id_resumes_after_a_disconnect(client, engine: FakeEngine) -> None:
    """The same URL with the last id continues without a new generation or repeated events, as EventSource expects."""
    async with client.stream("GET", "/generate", params=APPLE) as response:
        engine.allow(2)
        seen = await read_to(EventSource(response).aiter_sse(), 2)
    resuming = {"last-event-id": seen.id}
    async with client.stream("GET", "/generate", params=APPLE, headers=resuming) as response:
        engine.allow()
        received = await rest(EventSource(response).aiter_sse())
    assert len(engine.jobs) == 1
    assert {event.id.partition(":")[0] for event in received} == {seen.id.partition(":")[0]}
    assert all(int(event.id.partition(":")[2]) > int(seen.id.partition(":")[2]) for event in received[:-1])
    assert received[-1].event == "end"
    for path in ("/generate", f"/generations/{seen.id.partition(':')[0]}/events"):
        again = await client.get(
            path, params=APPLE if path == "/generate" else {}, headers={"last-event-id": received[-1].id}
        )
        # This status makes an EventSource stop reconnecting.
        assert (again.status_code, again.content) == (204, b"")
    posted = await client.post("/generate", json=APPLE, headers={"last-event-id": received[-1].id})
    assert posted.status_code == 204


@pytest.mark.parametrize(("given", "status"), [("nonsense", 400), ("a:b", 400), ("unknown:3", 404)])
async def test_an_invalid_last_event_id_is_rejected(client, given: str, status: int) -> None:
    """The error has a message, and no new generation starts."""
    response = await client.get("/generate", params=APPLE, headers={"last-event-id": given})
    assert response.status_code == status
    assert response.json()["error"]["message"]


@pytest.mark.proves("sse", "cancels")
async def test_a_disconnect_cancels_a_post_at_once_and_a_get_after_a_grace(
    client, service: Service, engine: FakeEngine
) -> None:
    """A GET waits for an EventSource to reconnect; a POST is cancelled when `curl` ends."""
    kept = await started(client, "GET", params=APPLE)
    await until(lambda: not service.generations.find(kept, Caller("")).readers)
    assert not engine.stops[0].is_set()
    await client.post(f"/generations/{kept}/cancel")
    engine.allow(1)
    await service.generations.idle()
    dropped = await started(client, "POST", json=APPLE)
    assert await asyncio.to_thread(engine.stops[1].wait, 20)
    engine.allow()
    await service.generations.idle()
    ended = (await client.get(f"/generations/{dropped}")).json()
    assert (ended["phase"], ended["error"]["reason"]) == ("PHASE_CANCELLED", "ABANDONED")


async def started(client, method: str, **options) -> str:
    """Starts a generation, waits until it denoises, disconnects, and returns its id."""
    async with client.stream(method, "/generate", **options) as response:
        async for event in EventSource(response).aiter_sse():
            message = json.loads(event.data)
            if message["phase"] == "PHASE_DENOISING":
                return message["generation_id"]
    raise AssertionError


async def test_images_can_be_sent_as_urls(client, service: Service, engine: FakeEngine) -> None:
    """A preview's URL returns that preview or a newer one, and after the end the final image."""
    async with client.stream("POST", "/generate", params={"images": "url"}, json=APPLE) as response:
        events = EventSource(response).aiter_sse()
        engine.allow(1)
        message = json.loads((await read_to(events, 1)).data)
        while "image_url" not in message:
            message = json.loads((await anext(events)).data)
        assert "image" not in message
        assert message["image_url"].startswith("/v1/generations/")
        url = f"http://{service.address}{message['image_url']}"
        preview = await client.get(url)
        assert preview.headers["content-type"] == "image/jpeg"
        assert preview.headers["cache-control"] == "no-store"
        assert preview.content.startswith(b"\xff\xd8")
        future = await client.get(f"/generations/{message['generation_id']}/preview/99")
        early = await client.get(f"/generations/{message['generation_id']}/image")
        assert [future.status_code, early.status_code] == [404, 404]
        assert float(early.headers["retry-after"]) > 0
        engine.allow()
        last = json.loads((await rest(events))[-1].data)
    final = await client.get(f"http://{service.address}{last['image_url']}")
    assert final.headers["content-type"] == "image/png"
    assert "immutable" in final.headers["cache-control"]
    assert (await client.get(url)).content == final.content
    state = (await client.get(f"/generations/{message['generation_id']}")).json()
    assert (state["phase"], state["image_url"]) == ("PHASE_SUCCEEDED", last["image_url"])


async def test_a_failed_generation_has_no_image(client, engine: FakeEngine) -> None:
    """Its image URLs answer 404 without the text of the exception."""
    engine.failure = RuntimeError("secret")
    engine.allow()
    response = await client.post("/generate", json=APPLE)
    message = json.loads(response.text.split("data: ")[-1].splitlines()[0])
    assert message["error"]["reason"] == "GENERATION_FAILED"
    for path in ("image", "preview/1"):
        gone = await client.get(f"/generations/{message['generation_id']}/{path}")
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "IMAGE_NOT_FOUND")
        assert "secret" not in gone.text


async def test_comments_keep_a_quiet_stream_open(client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A queued generation sends comments, so that proxies do not close the idle connection."""
    monkeypatch.setattr(sse, "KEEPALIVE_SECONDS", 0.05)
    async with client.stream("POST", "/generate", json=APPLE) as response:
        async with asyncio.timeout(20):
            async for line in response.aiter_lines():
                if line.startswith(": ping"):
                    break


async def test_a_large_final_image_comes_in_one_event(client, engine: FakeEngine, monkeypatch) -> None:
    """HTTP has no message size limit, so the image is not split into chunks as in gRPC."""
    from calotype_server.api import encoding

    monkeypatch.setattr(encoding, "_CHUNK_BYTES", 10)
    engine.allow()
    response = await client.post("/generate", json=APPLE)
    ends = [part for part in response.text.split("\n\n") if "event: end" in part]
    assert len(ends) == 1
    message = json.loads(ends[0].partition("data: ")[2].splitlines()[0])
    assert message["chunk_count"] == 1
    assert pb.Phase.Value(message["phase"]) == pb.PHASE_SUCCEEDED
