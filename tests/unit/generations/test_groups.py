"""Groups: which members a cancel reaches, in any order of requests and cancels."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calotype_server import errors
from calotype_server.auth.access import Caller
from calotype_server.auth.keys import Role
from calotype_server.generations.groups import tombstones
from calotype_server.generations.groups.tombstones import Tombstones
from calotype_server.generations.store import Store
from calotype_server.types import DeliveryOptions, DisconnectPolicy, Job, Phase
from support.engine.fake_engine import FakeEngine
from support.runtime import running_runtime

JOB = Job("a cat", None, 16, 16, 3, 3.0, 0, "DDIMScheduler")
CALLERS = ("alice", "bob")
GROUPS = ("cats", "dogs", "")


def member(caller: str, group: str, request_id: str = "") -> DeliveryOptions:
    """Returns the delivery of a member that runs without a reader."""
    return DeliveryOptions(caller=caller, group=group, request_id=request_id, on_disconnect=DisconnectPolicy.KEEP)


async def start(generations: Any, delivery: DeliveryOptions) -> Any:
    """Starts a generation and returns it."""
    async with generations.start(JOB, delivery) as reader:
        return reader.generation


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


actions = st.lists(
    st.one_of(
        st.tuples(st.just("start"), st.sampled_from(CALLERS), st.sampled_from(GROUPS), st.sampled_from(["", "1", "2"])),
        st.tuples(st.just("cancel"), st.sampled_from([*CALLERS, "operator"]), st.sampled_from(GROUPS[:2])),
        st.tuples(st.just("wait"), st.sampled_from([tombstones.SECONDS / 2, tombstones.SECONDS])),
    ),
    max_size=25,
)


@given(actions)
@settings(max_examples=60, deadline=None)
def test_any_order_of_requests_and_cancels(script: list) -> None:
    """A cancel ends exactly the members of the caller's group, counts each once, and rejects those that come later."""
    asyncio.run(play(script))


async def play(script: list) -> None:
    """Carries out a script on a server, and compares it with a model."""
    clock, engine = Clock(), FakeEngine()
    engine.hold()
    async with running_runtime(engine, max_queue=100) as runtime:
        generations = runtime.generations
        generations.groups._tombstones = Tombstones(clock)
        members: list[tuple[str, str, str, Any]] = []
        cancelled: dict[tuple[str, str], float] = {}
        for action, *arguments in script:
            match action, arguments:
                case "wait", [seconds]:
                    clock.now += seconds
                case "start", [caller, group, request_id]:
                    same = [each for each in members if request_id and each[::2][:2] == (caller, request_id)]
                    if same and same[0][1] != group:
                        with pytest.raises(errors.RequestIdTaken, match="group"):
                            await start(generations, member(caller, group, request_id))
                    elif same:
                        assert await start(generations, member(caller, group, request_id)) is same[0][3]
                    elif group and cancelled.get((caller, group), -1) > clock.now:
                        with pytest.raises(errors.GroupCancelled):
                            await start(generations, member(caller, group, request_id))
                    else:
                        started = await start(generations, member(caller, group, request_id))
                        members.append((caller, group, request_id, started))
                case "cancel", [caller, group]:
                    role = Role.OPERATOR if caller == "operator" else Role.USER
                    reached = [each for each in members if each[1] == group and caller in (each[0], "operator")]
                    live = [each[3] for each in reached if each[3].abort_error is None]
                    call = (group, Caller(caller, role, has_key=True))
                    if reached:
                        assert generations.groups.cancel(*call) == len(live)
                    else:
                        with pytest.raises(errors.GroupNotFound):
                            generations.groups.cancel(*call)
                    for owner in {caller, *(each[0] for each in reached)}:
                        cancelled[owner, group] = clock.now + tombstones.SECONDS
                    assert all(isinstance(each.abort_error, errors.Cancelled) for each in live)
        alive = [each for *_, each in members if each.abort_error is None]
        engine.allow()
        await asyncio.wait_for(generations.idle(), 20)
        for *_, each in members:
            assert each.events.state.phase is (Phase.SUCCEEDED if each in alive else Phase.CANCELLED)


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5), st.floats(0, tombstones.SECONDS)), max_size=60),
    st.integers(1, 3),
    st.integers(1, 2),
)
@settings(max_examples=100, deadline=None)
def test_tombstones_are_bounded(script: list, groups: int, callers: int) -> None:
    """At most so many cancels are remembered, for their time; those of few callers are complete up to the limit."""
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tombstones, "MAX_GROUPS", groups)
        patch.setattr(tombstones, "MAX_CALLERS", callers)
        kept, last = Tombstones(clock), {}
        for caller, group, seconds in script:
            clock.now += seconds
            kept.add(caller, str(group))
            last.pop((caller, group), None)
            last[caller, group] = clock.now
            assert len(kept) <= groups * callers
            for (owner, name), at in last.items():
                newer = [each for each in last if each[0] == owner and last[each] >= at and each != (owner, name)]
                is_recent = at + tombstones.SECONDS > clock.now
                if not is_recent:
                    assert not kept.has(owner, str(name))
                elif len(newer) < groups and len({each for each, _ in last}) <= callers:
                    assert kept.has(owner, str(name))


async def test_a_group_that_was_cancelled_before_its_members_arrive() -> None:
    """The cancel finds nothing, and yet none of the members that arrive after it starts."""
    engine = FakeEngine()
    async with running_runtime(engine) as runtime:
        with pytest.raises(errors.GroupNotFound):
            runtime.generations.groups.cancel("cats", Caller("alice"))
        for _ in range(2):
            with pytest.raises(errors.GroupCancelled):
                await start(runtime.generations, member("alice", "cats"))
        await start(runtime.generations, member("bob", "cats"))
        await runtime.generations.idle()
    assert len(engine.jobs) == 1


async def test_a_replaced_request_does_not_rejoin_a_cancelled_group() -> None:
    """The same request id would start an abandoned member again, but not after the cancel of its group."""
    engine = FakeEngine()
    engine.hold()
    delivery = DeliveryOptions(caller="alice", group="cats", request_id="1")
    async with running_runtime(engine) as runtime:
        abandoned = await start(runtime.generations, delivery)
        assert abandoned.is_replaceable
        assert runtime.generations.groups.cancel("cats", Caller("alice")) == 0
        with pytest.raises(errors.GroupCancelled):
            await start(runtime.generations, delivery)


async def test_several_images_join_a_group_together() -> None:
    """If the group of one request is cancelled, none of the requests that arrive with it starts."""
    engine = FakeEngine()
    async with running_runtime(engine) as runtime:
        with contextlib.suppress(errors.GroupNotFound):
            runtime.generations.groups.cancel("cats", Caller("alice"))
        together = [(JOB, member("alice", group)) for group in ("", "cats")]
        with pytest.raises(errors.GroupCancelled):
            async with runtime.generations.start_all(together):
                pass
    assert not engine.jobs


async def test_groups_survive_a_restart(tmp_path: Any) -> None:
    """A generation that runs again after a restart is still a member of its group."""
    store, engine = await Store.open(tmp_path), FakeEngine()
    engine.hold()
    async with running_runtime(engine, store=store) as runtime:
        await start(runtime.generations, member("alice", "cats"))
    await store.close()
    store, engine = await Store.open(tmp_path), FakeEngine()
    engine.hold()
    async with running_runtime(engine, store=store) as runtime:
        [restored] = runtime.generations.running
        assert restored.delivery.group == "cats"
        assert runtime.generations.groups.cancel("cats", Caller("alice")) == 1
        engine.allow()
        await runtime.generations.idle()
        assert restored.events.state.phase is Phase.CANCELLED
    await store.close()
