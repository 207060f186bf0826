"""The WebSocket: several generations on one connection, commands while they run, and close codes."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from calotype.v1 import calotype_pb2 as pb
from calotype_server.limits import PortLimits
from calotype_server.transport.http.websocket import MAX_STREAMS
from support.engine.fake_engine import FakeEngine
from support.http import open_socket, receive
from support.keyring import Keyring
from support.lab import until
from support.service import running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from support.service import Service

APPLE = {"prompt": "a red apple", "seed": 7}
KEPT = {**APPLE, "on_disconnect": "DISCONNECT_POLICY_KEEP"}


@pytest.fixture
def engine() -> FakeEngine:
    """An engine whose steps the test releases."""
    engine = FakeEngine()
    engine.hold()
    return engine


@pytest.fixture
async def service(engine: FakeEngine) -> AsyncIterator[Service]:
    """A server with that engine and two slots."""
    async with running(engine, transport="websocket", max_active=2, max_queue=40) as service:
        yield service


@pytest.fixture
async def socket(service: Service) -> AsyncIterator[Any]:
    """An open WebSocket."""
    async with await open_socket(service.address) as socket:
        yield socket


async def send(socket, kind: str, name: str = "a", **fields) -> None:
    """Sends a command."""
    await socket.send(json.dumps({"type": kind, "id": name, **fields}))


async def read_until(socket, condition) -> dict[str, Any]:
    """Reads until a frame satisfies the condition, and returns it."""
    async with asyncio.timeout(20):
        while not condition(frame := await receive(socket)):
            pass
    return frame


async def read_ends(socket, *names: str) -> dict[str, pb.Progress]:
    """Reads until each of the named generations has ended, and returns their last messages."""
    ends: dict[str, pb.Progress] = {}
    while len(ends) < len(names):
        frame = await read_until(socket, lambda frame: frame["type"] == "end")
        ends[frame["id"]] = frame["progress"]
    assert set(ends) == set(names)
    return ends


@pytest.mark.proves("websocket", "streams")
async def test_several_generations_share_a_connection(socket, engine: FakeEngine) -> None:
    """Each message has the id of its generation, and is followed by its image."""
    engine.allow()
    for seed, name in enumerate("abc"):
        await send(socket, "generate", name, request={"prompt": name, "seed": seed})
    ends = await read_ends(socket, "a", "b", "c")
    assert [ends[name].seed for name in "abc"] == [0, 1, 2]
    assert all(end.image.startswith(b"\x89PNG") for end in ends.values())
    assert len({end.generation_id for end in ends.values()}) == 3


async def test_commands_work_while_generations_run(socket, engine: FakeEngine) -> None:
    """Cancel and finish work on the connection that follows both generations; the answers have the commands' ids."""
    ids = {}
    for name in "ab":
        await send(socket, "generate", name, request=APPLE)
    while len(ids) < 2:
        frame = await read_until(socket, lambda frame: frame["progress"].phase == pb.PHASE_DENOISING)
        ids[frame["id"]] = frame["progress"].generation_id
    await send(socket, "cancel", "c", request={"generation_id": ids["a"]})
    answer = await read_until(socket, lambda frame: frame["type"] == "cancel")
    assert answer == {"type": "cancel", "id": "c", "phase": "PHASE_DENOISING", "cancelled_count": 1}
    await send(socket, "finish", "d", request={"generation_id": ids["b"]})
    assert (await read_until(socket, lambda frame: frame["type"] == "finish"))["id"] == "d"
    engine.allow()
    ends = await read_ends(socket, "a", "b")
    assert ends["a"].error.reason == "CANCELLED"
    assert (ends["b"].phase, ends["b"].finished_early) == (pb.PHASE_SUCCEEDED, True)


async def test_leaving_one_generation_does_not_affect_the_others(socket, service: Service, engine: FakeEngine) -> None:
    """The disconnect policy of that generation applies, and its id can be used again."""
    for name in "ab":
        await send(socket, "generate", name, request={"prompt": name})
        await read_until(socket, lambda frame, name=name: frame["id"] == name and frame["progress"].step == 0)
    await until(lambda: len(engine.stops) == 2)
    await send(socket, "leave", "a")
    left = engine.stops[[job.prompt for job in engine.jobs].index("a")]
    assert await asyncio.to_thread(left.wait, 20)
    await send(socket, "generate", "a", request={"prompt": "again"})
    engine.allow()
    ends = await read_ends(socket, "a", "b")
    assert {end.phase for end in ends.values()} == {pb.PHASE_SUCCEEDED}


@pytest.mark.proves("websocket", "cancels")
async def test_closing_applies_each_disconnect_policy(service: Service, engine: FakeEngine) -> None:
    """The generation with KEEP continues, and the other one is cancelled."""
    async with await open_socket(service.address) as socket:
        for name, request in (("a", {**APPLE, "prompt": "dropped"}), ("b", {**KEPT, "prompt": "kept"})):
            await send(socket, "generate", name, request=request)
        await until(lambda: len(engine.stops) == 2)
    stops = dict(zip((job.prompt for job in engine.jobs), engine.stops, strict=True))
    assert await asyncio.to_thread(stops["dropped"].wait, 20)
    assert not stops["kept"].is_set()
    engine.allow()
    await service.generations.idle()


@pytest.mark.proves("websocket", "errors")
@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("{", ["command"]),
        ("[]", ["body", "type"]),
        ('{"id": "x"}', ["type"]),
        ('{"type": "dance", "id": 5, "odd": 1}', ["type", "id", "odd"]),
        ('{"type": "leave", "id": "unknown"}', ["id"]),
        ('{"type": "cancel", "id": "x", "request": {}}', ["generation_id"]),
        ('{"type": "cancel", "id": "x", "request": {"generation": "y"}}', ["generation"]),
        (
            '{"type": "generate", "request": {"width_px": "x", "seed": -2, "odd": 1}}',
            ["width_px", "odd", "prompt", "seed"],
        ),
        ('{"type": "watch", "request": {"after_sequence": -1}}', ["generation_id", "after_sequence"]),
    ],
)
async def test_invalid_commands_get_an_error_and_affect_nothing_else(
    socket, engine: FakeEngine, text: str, fields
) -> None:
    """The error lists every violation, and an active generation continues."""
    await send(socket, "generate", "good", request=APPLE)
    await socket.send(text)
    error = await read_until(socket, lambda frame: frame["type"] == "error")
    assert [each["field"] for each in error["error"]["violations"]] == fields
    engine.allow()
    assert (await read_ends(socket, "good"))["good"].phase == pb.PHASE_SUCCEEDED


async def test_a_duplicate_id_and_too_many_streams_are_rejected(socket, service: Service, engine: FakeEngine) -> None:
    """One connection follows at most MAX_STREAMS generations, each with its own id."""
    for number in range(MAX_STREAMS):
        await send(socket, "generate", str(number), request=APPLE)
    await send(socket, "generate", "0", request=APPLE)
    taken = await read_until(socket, lambda frame: frame["type"] == "error")
    assert (taken["id"], taken["error"]["violations"][0]["field"]) == ("0", "id")
    await send(socket, "generate", "more", request=APPLE)
    many = await read_until(socket, lambda frame: frame["type"] == "error")
    assert (many["id"], many["error"]["code"]) == ("more", "TOO_MANY_STREAMS")
    engine.allow()


@pytest.mark.parametrize(("given", "code"), [(b"binary", 1003), ("x" * 70_000, 1009)])
async def test_binary_and_oversized_frames_close_the_connection(socket, given, code: int) -> None:
    """Clients may not send binary frames, or frames above the size limit."""
    await socket.send(given)
    with pytest.raises(ConnectionClosed):
        async with asyncio.timeout(20):
            await socket.recv()
    assert socket.close_code == code


async def test_pings_are_answered(socket) -> None:
    """A client can detect a dead connection."""
    async with asyncio.timeout(20):
        await (await socket.ping())


async def test_foreign_pages_cannot_connect(service: Service) -> None:
    """CORS does not apply to WebSockets, but the origin and host check does."""
    for origin, host in (("https://evil.example", None), (None, "evil.example")):
        headers = {"Host": host} if host else {}
        with pytest.raises(InvalidStatus) as caught:
            await open_socket(service.address, origin=origin, additional_headers=headers)
        assert caught.value.response.status_code == 403


async def test_a_stopping_server_ends_generations_and_closes_with_1012(
    service: Service, socket, engine: FakeEngine
) -> None:
    """Active generations receive their typed end, and then the connection closes with 1012 (service restart)."""
    await send(socket, "generate", request=APPLE)
    await read_until(socket, lambda frame: frame["progress"].phase == pb.PHASE_DENOISING)
    service.generations.reject_new(retry_after=5.0)
    await send(socket, "generate", "b", request=APPLE)
    rejected = await read_until(socket, lambda frame: frame["id"] == "b")
    assert (rejected["error"]["code"], rejected["error"]["retry_after"]) == ("DRAINING", 5.0)
    ending = asyncio.create_task(service.generations.abort_all())
    await asyncio.sleep(0)
    engine.allow()
    await ending
    assert (await read_ends(socket, "a"))["a"].error.reason == "DRAINING"
    await service.channel.stop(0)
    with pytest.raises(ConnectionClosed):
        await socket.recv()
    assert socket.close_code == 1012


async def test_a_browser_sends_its_key_as_a_subprotocol(tmp_path: Path) -> None:
    """Browsers cannot set headers, so the key may be an offered subprotocol, which the server never accepts."""
    keyring = Keyring(tmp_path / "keys.toml")
    key = keyring.add("alice")
    async with running(FakeEngine(), transport="websocket", access=keyring.access()) as service:
        with pytest.raises(InvalidStatus) as caught:
            await open_socket(service.address)
        assert caught.value.response.status_code == 401
        assert json.loads(caught.value.response.body)["error"]["code"] == "KEY_REQUIRED"
        offered = ["calotype.v1", f"calotype.bearer.{key}"]
        async with await open_socket(service.address, subprotocols=offered) as socket:
            assert socket.subprotocol == "calotype.v1"
            await send(socket, "generate", request=APPLE)
            assert (await read_ends(socket, "a"))["a"].phase == pb.PHASE_SUCCEEDED


async def test_each_generation_counts_as_a_call_of_its_host() -> None:
    """Several generations on one connection count towards the call limit of the host."""
    engine = FakeEngine()
    engine.hold()
    async with running(engine, transport="websocket", ports=PortLimits(max_calls_per_peer=3), max_queue=9) as service:
        async with await open_socket(service.address) as socket:
            for number in range(3):
                await send(socket, "generate", str(number), request=APPLE)
            rejected = await read_until(socket, lambda frame: frame["type"] == "error")
            assert (rejected["id"], rejected["error"]["code"]) == ("2", "TOO_MANY_CALLS")
            with pytest.raises(InvalidStatus) as caught:
                await open_socket(service.address)
            assert caught.value.response.status_code == 429
        engine.allow()


async def test_the_request_timeout_does_not_apply_to_websockets() -> None:
    """A WebSocket may stay quiet longer than a request may take to arrive."""
    async with running(FakeEngine(), transport="websocket", ports=PortLimits(request_seconds=0.05)) as service:
        socket = await open_socket(service.address)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(socket.wait_closed(), 0.3)
        await (await socket.ping())
        await socket.close()
