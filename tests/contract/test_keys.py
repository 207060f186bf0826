"""API keys on every port: which calls need one, whose generations a key can see, and the limits of a key."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from calotype.v1 import calotype_pb2 as pb
from calotype_server.file_watcher import FileWatcher
from calotype_server.generations.store import Store
from support.engine.fake_engine import FakeEngine
from support.grpcweb import Connection, frame, read_answer
from support.keyring import Keyring, notice_change
from support.service import read_until, running

if TYPE_CHECKING:
    from pathlib import Path

CAT = pb.GenerateRequest(prompt="a cat", on_disconnect=pb.DISCONNECT_POLICY_KEEP)


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    """Two users and an operator."""
    keyring = Keyring(tmp_path / "keys.toml")
    keyring.add("alice")
    keyring.add("bob")
    keyring.add("root", role="operator")
    return keyring


def every_rpc(stub: Any, generation_id: str = "unknown") -> dict[str, Any]:
    """Returns every method of the service with a request for a generation."""
    return {
        "Generate": (stub.Generate, CAT),
        "Watch": (stub.Watch, pb.WatchRequest(generation_id=generation_id)),
        "Cancel": (stub.Cancel, pb.CancelRequest(generation_id=generation_id)),
        "Finish": (stub.Finish, pb.FinishRequest(generation_id=generation_id)),
        "ListGenerations": (stub.ListGenerations, pb.ListGenerationsRequest()),
        "GetModel": (stub.GetModel, pb.GetModelRequest()),
    }


async def outcome(method: Any, request: Any, metadata: Any = None) -> Any:
    """Returns the messages of a streaming call, or the answer of a unary one."""
    call = method(request, metadata=metadata)
    return [message async for message in call] if hasattr(call, "__aiter__") else await call


async def rejection(method: Any, request: Any, metadata: Any = None) -> tuple[grpc.StatusCode, str, float | None]:
    """Returns the code, the reason and the retry delay in seconds of a call that must be rejected."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await outcome(method, request, metadata)
    info, retry = ErrorInfo(), RetryInfo()
    wait = None
    for detail in rpc_status.from_call(caught.value).details:
        detail.Unpack(info)
        if detail.Unpack(retry):
            wait = retry.retry_delay.ToNanoseconds() / 1e9
    return caught.value.code(), info.reason, wait


async def test_every_rpc_needs_a_key(transport: str, keyring: Keyring) -> None:
    """Calls with no key, a malformed, a wrong or an expired one are rejected, and no generation starts."""
    keyring.add("late", expires=datetime.fromtimestamp(keyring.time, UTC))
    engine = FakeEngine()
    async with running(engine, access=keyring.access(), transport=transport) as service:
        for reason, metadata in (
            ("KEY_REQUIRED", None),
            ("KEY_INVALID", (("authorization", "Bearer nonsense"),)),
            ("KEY_INVALID", (("authorization", "~" * 4000),)),
            ("KEY_INVALID", (("authorization", f"Bearer calotype_alice_{'A' * 43}"),)),
            ("KEY_EXPIRED", keyring.metadata("late")),
        ):
            for method, request in every_rpc(service.stub).values():
                found = await rejection(method, request, metadata)
                assert found == (grpc.StatusCode.UNAUTHENTICATED, reason, None)
        assert not engine.jobs


async def test_two_keys_are_rejected(keyring: Keyring) -> None:
    """A proxy and the server could otherwise use different ones."""
    async with running(FakeEngine(), access=keyring.access()) as service:
        both = (*keyring.metadata("alice"), *keyring.metadata("bob"))
        code, reason, _ = await rejection(service.stub.GetModel, pb.GetModelRequest(), both)
        assert (code, reason) == (grpc.StatusCode.UNAUTHENTICATED, "KEY_INVALID")


async def test_non_ascii_keys_are_rejected(keyring: Keyring) -> None:
    """A header with arbitrary bytes gets the same status as a wrong key."""
    async with running(FakeEngine(), access=keyring.access(), transport="grpc-web") as service:
        for value in ("Bearer \xff\xfe\x80", "\x80\x81", "Bearer " + "\xe9" * 3000):
            connection = await Connection.open(service.address)
            kind = {"host": service.address, "content-type": "application/grpc-web+proto", "authorization": value}
            await connection.request("POST", "/calotype.v1.GenerationService/GetModel", kind, frame(b""))
            _, trailers = read_answer(await connection.answer())
            connection.close()
            assert trailers["grpc-status"] == "16"


async def test_health_checks_need_no_key_and_reflection_does(keyring: Keyring) -> None:
    """Load balancers have no key; reading the contract of a protected server needs one."""
    async with running(FakeEngine(), access=keyring.access()) as service:
        health: Any = health_pb2_grpc.HealthStub(service.channel)
        answer = await health.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        watching = health.Watch(health_pb2.HealthCheckRequest())
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING
        watching.cancel()
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(service.channel)
        requests = [reflection_pb2.ServerReflectionRequest(list_services="")]
        call = reflection.ServerReflectionInfo(iter(requests))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        call = reflection.ServerReflectionInfo(iter(requests), metadata=keyring.metadata("alice"))
        assert (await call.read()).list_services_response.service


async def test_unknown_methods_need_a_key(keyring: Keyring) -> None:
    """A caller without a key cannot find out which methods exist."""
    async with running(FakeEngine(), access=keyring.access()) as service:
        method = service.channel.unary_unary("/calotype.v1.Secret/Method")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await method(b"")
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await method(b"", metadata=keyring.metadata("alice"))
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_the_page_and_health_checks_need_no_key(keyring: Keyring) -> None:
    """A browser can load the page, which then prompts for the key."""
    async with running(FakeEngine(), access=keyring.access(), transport="grpc-web") as service:
        for path in ("/", "/healthz", "/readyz"):
            connection = await Connection.open(service.address)
            await connection.request("GET", path, {"host": service.address})
            assert (await connection.answer("GET"))[0].status_code == 200
            connection.close()


async def test_users_cannot_see_generations_of_others(transport: str, keyring: Keyring) -> None:
    """No method lets a user access or detect the generation of another user; operators can access all."""
    engine = FakeEngine()
    engine.hold()
    async with running(engine, access=keyring.access(), transport=transport) as service:
        alice, bob, root = (keyring.metadata(name) for name in ("alice", "bob", "root"))
        call = service.stub.Generate(CAT, metadata=alice)
        generation_id = (await read_until(call, pb.PHASE_DENOISING)).generation_id
        for known in (generation_id, "unknown"):
            rpcs = every_rpc(service.stub, known)
            for name in ("Watch", "Cancel", "Finish"):
                method, request = rpcs[name]
                found = await rejection(method, request, bob)
                assert found == (grpc.StatusCode.NOT_FOUND, "GENERATION_NOT_FOUND", None), (known, name)
        listed = pb.ListGenerationsRequest()
        for metadata, ids in ((alice, [generation_id]), (bob, []), (root, [generation_id])):
            page = await service.stub.ListGenerations(listed, metadata=metadata)
            assert [each.generation_id for each in page.generations] == ids
        watching = service.stub.Watch(pb.WatchRequest(generation_id=generation_id), metadata=root)
        assert (await watching.read()).generation_id == generation_id
        cancelled = await service.stub.Cancel(pb.CancelRequest(generation_id=generation_id), metadata=root)
        assert cancelled.phase == pb.PHASE_DENOISING
        engine.allow()


async def test_request_ids_are_separate_for_each_key(transport: str, keyring: Keyring) -> None:
    """The same request id starts two generations for two users, but one for the same user."""
    async with running(FakeEngine(), access=keyring.access(), transport=transport) as service:
        request = pb.GenerateRequest(prompt="a cat", request_id="mine", on_disconnect=pb.DISCONNECT_POLICY_KEEP)
        ids = []
        for name in ("alice", "bob", "alice"):
            messages = await outcome(service.stub.Generate, request, keyring.metadata(name))
            ids.append(messages[-1].generation_id)
        assert ids[0] == ids[2] != ids[1]


async def test_ownership_survives_a_restart(keyring: Keyring, tmp_path: Path) -> None:
    """With a state folder, a generation still belongs to its key after a restart."""
    for first in (True, False):
        store = await Store.open(tmp_path / "state")
        try:
            async with running(FakeEngine(), access=keyring.access(), store=store) as service:
                if first:
                    messages = await outcome(service.stub.Generate, CAT, keyring.metadata("alice"))
                    generation_id = messages[-1].generation_id
                    continue
                watch = pb.WatchRequest(generation_id=generation_id)
                assert (await outcome(service.stub.Watch, watch, keyring.metadata("alice")))[-1].image
                code, _, _ = await rejection(service.stub.Watch, watch, keyring.metadata("bob"))
                assert code is grpc.StatusCode.NOT_FOUND
        finally:
            await store.close()


async def test_a_removed_key_is_rejected(transport: str, keyring: Keyring) -> None:
    """After the file is reloaded, calls with the key are rejected; an active stream continues to its end."""
    engine = FakeEngine()
    engine.hold()
    access = keyring.access()
    async with running(engine, access=access, transport=transport) as service:
        watcher = FileWatcher(access.files, access.reload)
        call = service.stub.Generate(CAT, metadata=keyring.metadata("alice"))
        assert (await call.read()).phase == pb.PHASE_QUEUED
        keyring.path.write_text("key = []")
        notice_change(watcher)
        code, reason, _ = await rejection(service.stub.GetModel, pb.GetModelRequest(), keyring.metadata("alice"))
        assert (code, reason) == (grpc.StatusCode.UNAUTHENTICATED, "KEY_INVALID")
        engine.allow()
        while (message := await call.read()) is not grpc.aio.EOF:
            last = message
        assert last.phase == pb.PHASE_SUCCEEDED


@pytest.mark.parametrize(
    ("limits", "reason", "wait"),
    [
        ({"requests_per_minute": 1}, "REQUESTS_PER_MINUTE", 60.0),
        ({"pixel_steps_per_minute": 64 * 64 * 4}, "PIXEL_STEPS_PER_MINUTE", 60.0),
        ({"concurrent": 1}, "CONCURRENT_GENERATIONS", 2.0),
    ],
)
async def test_a_key_limit_rejects_and_recovers(
    limits: dict[str, float], reason: str, wait: float, transport: str, keyring: Keyring
) -> None:
    """The error names the limit and the retry delay. Other keys are not affected, and a retry after the delay works."""
    keyring.add("carol", **limits)
    engine = FakeEngine()
    engine.hold()
    async with running(engine, access=keyring.access(), transport=transport) as service:
        carol = keyring.metadata("carol")
        request = pb.GenerateRequest(prompt="a cat", request_id="first", on_disconnect=pb.DISCONNECT_POLICY_KEEP)
        call = service.stub.Generate(request, metadata=carol)
        assert (await call.read()).phase == pb.PHASE_QUEUED
        found = await rejection(service.stub.Generate, CAT, carol)
        assert found[:2] == (grpc.StatusCode.RESOURCE_EXHAUSTED, reason)
        assert found[2] == pytest.approx(wait)
        engine.allow()
        # A retry with the same request id does not count as a second start.
        assert (await outcome(service.stub.Generate, request, carol))[-1].phase == pb.PHASE_SUCCEEDED
        assert (await outcome(service.stub.Generate, CAT, keyring.metadata("alice")))[-1].phase == pb.PHASE_SUCCEEDED
        keyring.time += wait
        assert (await outcome(service.stub.Generate, CAT, carol))[-1].phase == pb.PHASE_SUCCEEDED


async def test_keys_share_the_queue_fairly(keyring: Keyring) -> None:
    """Two keys on one host take turns: three queued images of one key delay the other key by one image."""
    engine = FakeEngine()
    engine.hold()
    async with running(engine, access=keyring.access(), max_queue=8) as service:
        calls = []
        for number, name in enumerate(["alice", "alice", "alice", "bob"]):
            request = pb.GenerateRequest(prompt=f"{name} {number}", on_disconnect=pb.DISCONNECT_POLICY_KEEP)
            calls.append(service.stub.Generate(request, metadata=keyring.metadata(name)))
            await calls[-1].read()
        engine.allow()
        for call in calls:
            while await call.read() is not grpc.aio.EOF:
                pass
        assert [job.prompt for job in engine.jobs].index("bob 3") == 1
