"""Server-sent events: what an EventSource and `curl -N` may rely on beyond what every transport promises."""

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
    """One whose steps happen when the test says so."""
    engine = FakeEngine()
    engine.hold()
    return engine


@pytest.fixture
async def service(engine: FakeEngine) -> AsyncIterator[Service]:
    """A server around it."""
    async with running(engine, transport="sse") as service:
        yield service


@pytest.fixture
def client(service: Service) -> httpx.AsyncClient:
    """One of HTTP."""
    return service.stub.client


async def read_to(events, step: int):
    """Reads up to the first event of a step."""
    async for event in sse:
        if json.loads(event.data).get("step", 0) >= step:
            return event
    raise AssertionError


async def rest(events) -> list:
    """What is left of a stream."""
    return [event async for event in sse]


@pytest.mark.proves("sse", "streams")
async def test_a_stream_is_as_browsers_and_proxies_want_it(client, engine: FakeEngine) -> None:
    """Its type, never cached or buffered, ids that name the generation and rise, and a time to reconnect."""
    engine.allow()
    async with client.stream("GET", "/generate", params=APPLE) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["x-accel-buffering"] == "no"
        assert response.headers["x-request-id"]
        told = await rest(EventSource(response).aiter_sse())
    assert {event.event for event in told[:-1]} == {"progress"}
    assert told[-1].event == "end"
    assert told[0].retry == 1000
    sequences = [int(event.id.partition(":")[2]) for event in told]
    assert sequences == sorted(set(sequences))
    last = json.loads(told[-1].data)
    assert (last["phase"], last["seed"]) == ("PHASE_SUCCEEDED", "7")
    assert base64.b64decode(last["image"]).startswith(b"\x89PNG")


@pytest.mark.proves("sse", "resumes")
async def test_last_event_id_goes_on_where_the_link_broke(client, engine: FakeEngine) -> None:
    """The same URL with the last id, as an EventSource asks again: nothing is begun anew, nothing told twice."""
    async with client.stream("GET", "/generate", params=APPLE) as response:
        engine.allow(2)
        seen = await read_to(EventSource(response).aiter_sse(), 2)
    resuming = {"last-event-id": seen.id}
    async with client.stream("GET", "/generate", params=APPLE, headers=resuming) as response:
        engine.allow()
        told = await rest(EventSource(response).aiter_sse())
    assert len(engine.jobs) == 1
    assert {event.id.partition(":")[0] for event in told} == {seen.id.partition(":")[0]}
    assert all(int(event.id.partition(":")[2]) > int(seen.id.partition(":")[2]) for event in told)
    assert told[-1].event == "end"
    for path in ("/generate", f"/generations/{seen.id.partition(':')[0]}/events"):
        again = await client.get(
            path, params=APPLE if path == "/generate" else {}, headers={"last-event-id": told[-1].id}
        )
        # What an EventSource takes for "do not come back".
        assert (again.status_code, again.content) == (204, b"")
    posted = await client.post("/generate", json=APPLE, headers={"last-event-id": told[-1].id})
    assert posted.status_code == 204


@pytest.mark.parametrize(("given", "status"), [("nonsense", 400), ("a:b", 400), ("nobody:3", 404)])
async def test_a_last_event_id_of_nobody_is_refused(client, given: str, status: int) -> None:
    """Nothing is begun in its place."""
    response = await client.get("/generate", params=APPLE, headers={"last-event-id": given})
    assert response.status_code == status
    assert response.json()["error"]["message"]


@pytest.mark.proves("sse", "cancels")
async def test_leaving_a_get_gives_time_to_come_back_and_a_post_does_not(
    client, service: Service, engine: FakeEngine
) -> None:
    """An EventSource reconnects by itself; whoever ends a `curl` wants no more of it."""
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
    """Starts a generation, waits until it denoises, leaves, and returns its id."""
    async with client.stream(method, "/generate", **options) as response:
        async for event in EventSource(response).aiter_sse():
            message = json.loads(event.data)
            if message["phase"] == "PHASE_DENOISING":
                return message["generation_id"]
    raise AssertionError


async def test_pictures_may_come_by_url(client, service: Service, engine: FakeEngine) -> None:
    """Events stay small; a preview's URL gives one that is as new, and the final image once there is no other."""
    async with client.stream("POST", "/generate", params={"images": "url"}, json=APPLE) as response:
        sse = EventSource(response).aiter_sse()
        engine.allow(1)
        message = json.loads((await read_to(sse, 1)).data)
        while "image_url" not in message:
            message = json.loads((await anext(sse)).data)
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
        last = json.loads((await rest(sse))[-1].data)
    final = await client.get(f"http://{service.address}{last['image_url']}")
    assert final.headers["content-type"] == "image/png"
    assert "immutable" in final.headers["cache-control"]
    assert (await client.get(url)).content == final.content
    state = (await client.get(f"/generations/{message['generation_id']}")).json()
    assert (state["phase"], state["image_url"]) == ("PHASE_SUCCEEDED", last["image_url"])


async def test_what_was_withdrawn_or_failed_has_no_picture(client, engine: FakeEngine) -> None:
    """404, with the reason in words."""
    engine.failure = RuntimeError("secret")
    engine.allow()
    response = await client.post("/generate", json=APPLE)
    message = json.loads(response.text.split("data: ")[-1].splitlines()[0])
    assert message["error"]["reason"] == "GENERATION_FAILED"
    for path in ("image", "preview/1"):
        gone = await client.get(f"/generations/{message['generation_id']}/{path}")
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "IMAGE_NOT_FOUND")
        assert "secret" not in gone.text


async def test_silence_is_filled_with_comments(client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proxies that close what says nothing keep a stream that waits in the queue."""
    monkeypatch.setattr(sse, "_HEARTBEAT_SECONDS", 0.05)
    async with client.stream("POST", "/generate", json=APPLE) as response:
        async with asyncio.timeout(20):
            async for line in response.aiter_lines():
                if line.startswith(": ping"):
                    break


async def test_a_large_final_image_comes_in_one_event(client, engine: FakeEngine, monkeypatch) -> None:
    """Chunks are a matter of gRPC's limits."""
    from calotype_server.api import encoding

    monkeypatch.setattr(encoding, "_CHUNK_BYTES", 10)
    engine.allow()
    response = await client.post("/generate", json=APPLE)
    ends = [part for part in response.text.split("\n\n") if "event: end" in part]
    assert len(ends) == 1
    message = json.loads(ends[0].partition("data: ")[2].splitlines()[0])
    assert message["chunk_count"] == 1
    assert pb.Phase.Value(message["phase"]) == pb.PHASE_SUCCEEDED
