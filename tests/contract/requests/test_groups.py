"""Groups on every transport: one call cancels all generations of a group."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_status import rpc_status

from calotype.v1 import calotype_pb2 as pb
from support.engine.fake_engine import FakeEngine
from support.keyring import Keyring
from support.service import read_until, running

if TYPE_CHECKING:
    from pathlib import Path

AWKWARD = "cats/dogs & ?#%2F ~"
"""A group whose name must be escaped in a URL."""


def member(group: str, seed: int, **changes) -> pb.GenerateRequest:
    """Returns the request of one member, which continues without readers."""
    return pb.GenerateRequest(
        prompt="a cat", seed=seed, group=group, on_disconnect=pb.DISCONNECT_POLICY_KEEP, **changes
    )


async def reason_of(call) -> tuple[grpc.StatusCode, str]:
    """Returns the code and the reason of a call that fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call.read() if hasattr(call, "read") else call)
    info = ErrorInfo()
    assert rpc_status.from_call(caught.value).details[0].Unpack(info)
    return caught.value.code(), info.reason


async def test_one_call_cancels_all_members(transport: str) -> None:
    """Running and queued members end, other generations continue, and a repeated cancel finds nothing to do."""
    engine = FakeEngine()
    engine.hold()
    async with running(engine, transport=transport) as service:
        calls = [service.stub.Generate(member(group, seed)) for seed, group in enumerate((AWKWARD, AWKWARD, "other"))]
        first = [await call.read() for call in calls]
        answer = await service.stub.Cancel(pb.CancelRequest(group=AWKWARD))
        assert (answer.cancelled_count, answer.phase) == (2, pb.PHASE_UNSPECIFIED)
        engine.allow()
        for call in calls[:2]:
            assert (await read_until(call, pb.PHASE_CANCELLED)).error.reason == "CANCELLED"
        assert (await read_until(calls[2], pb.PHASE_SUCCEEDED)).image
        again = await service.stub.Cancel(pb.CancelRequest(group=AWKWARD))
        assert again.cancelled_count == 0
        listed = (await service.stub.ListGenerations(pb.ListGenerationsRequest())).generations
        assert {each.generation_id: each.group for each in listed} == {
            message.generation_id: group for message, group in zip(first, (AWKWARD, AWKWARD, "other"), strict=True)
        }


async def test_a_member_that_arrives_after_the_cancel_is_rejected(transport: str) -> None:
    """The cancel overtakes the requests: it finds nothing, and the member ends with CANCELLED before it starts."""
    engine = FakeEngine()
    async with running(engine, transport=transport) as service:
        unknown = await reason_of(service.stub.Cancel(pb.CancelRequest(group="cats")))
        assert unknown == (grpc.StatusCode.NOT_FOUND, "GROUP_NOT_FOUND")
        late = await reason_of(service.stub.Generate(member("cats", 1)))
        assert late == (grpc.StatusCode.CANCELLED, "GROUP_CANCELLED")
        assert not engine.jobs


async def test_a_cancel_names_a_generation_or_a_group() -> None:
    """Neither, both, and impossible names of groups are violations."""
    async with running(FakeEngine()) as service:
        for request in (
            pb.CancelRequest(),
            pb.CancelRequest(generation_id="a", group="b"),
            pb.CancelRequest(group="x" * 129),
            pb.CancelRequest(group="käse"),
        ):
            assert await reason_of(service.stub.Cancel(request)) == (
                grpc.StatusCode.INVALID_ARGUMENT,
                "INVALID_REQUEST",
            )
        for group in ("x" * 129, "käse", "a\nb"):
            found = await reason_of(service.stub.Generate(pb.GenerateRequest(prompt="a cat", group=group)))
            assert found == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")


async def test_the_cancel_of_one_generation_counts_it_once(transport: str) -> None:
    """The first cancel by id counts 1, and a second one 0."""
    engine = FakeEngine()
    engine.hold()
    async with running(engine, transport=transport) as service:
        generation_id = (await service.stub.Generate(member("", 1)).read()).generation_id
        request = pb.CancelRequest(generation_id=generation_id)
        counts = [(await service.stub.Cancel(request)).cancelled_count for _ in range(2)]
        assert counts == [1, 0]
        engine.allow()


async def test_keys_separate_groups(tmp_path: Path) -> None:
    """Users reach only their own group of a name; an operator reaches those of all users."""
    keyring, engine = Keyring(tmp_path / "keys.toml"), FakeEngine()
    for name in ("alice", "bob"):
        keyring.add(name)
    keyring.add("root", role="operator")
    engine.hold()
    async with running(engine, access=keyring.access()) as service:
        cancel, cats = service.stub.Cancel, pb.CancelRequest(group="cats")
        await service.stub.Generate(member("cats", 1), metadata=keyring.metadata("alice")).read()
        unknown = await reason_of(cancel(cats, metadata=keyring.metadata("bob")))
        assert unknown == (grpc.StatusCode.NOT_FOUND, "GROUP_NOT_FOUND")
        assert (await cancel(cats, metadata=keyring.metadata("root"))).cancelled_count == 1
        late = await reason_of(service.stub.Generate(member("cats", 2), metadata=keyring.metadata("alice")))
        assert late == (grpc.StatusCode.CANCELLED, "GROUP_CANCELLED")
        engine.allow()
