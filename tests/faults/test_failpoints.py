"""Failures, delays and hangs at every failpoint of a running server break no promise."""

from __future__ import annotations

import ast
import asyncio
import contextlib
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import structlog

import calotype_server
from calotype.v1 import calotype_pb2 as pb
from calotype_server import errors
from calotype_server.engine.assembly import build_engine
from calotype_server.engine.capabilities import Defaults
from calotype_server.failpoints import FAILPOINTS
from calotype_server.generations import state_writer
from calotype_server.generations.store import Store
from support.engine import tiny
from support.engine.fake_engine import FakeEngine
from support.engine.schedulers import schedulers_examined_once
from support.faults import Fault, Faults, Panic
from support.history import History, read, violations
from support.service import running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE = 10
RETAINED = 6
"""As many generations as a scenario starts at most, because a request that fails is repeated as a new one."""

PRODUCT = Path(calotype_server.__file__).parent
TRANSPORTS = {"grpc": "native", "grpcweb": "grpc-web", "http": "sse"}
"""The transport that reaches the failpoints of an area."""


def hits() -> Iterator[str]:
    """Yields the argument of each `hit(...)` in the product as a pattern of names."""
    for path in PRODUCT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "hit":
                (argument,) = node.args
                parts = argument.values if isinstance(argument, ast.JoinedStr) else [argument]
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in parts)


def test_every_failpoint_is_placed_and_named() -> None:
    """The product hits each name of `FAILPOINTS`, and no other."""
    patterns = set(hits())
    assert [name for name in sorted(FAILPOINTS) if not any(fnmatch(name, each) for each in patterns)] == []
    assert [each for each in sorted(patterns) if not any(fnmatch(name, each) for name in FAILPOINTS)] == []


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder, so that the tiny model is calibrated only once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make_engine(name: str, heads: Path) -> Callable[[], object]:
    """Makes engines: real ones for the failpoints of engine and encoder, others for the rest."""
    if name.partition(".")[0] != "engine":
        return FakeEngine

    def make() -> object:
        with schedulers_examined_once():
            return build_engine(
                "tiny", tiny.build("sd15"), defaults=Defaults(), cache_dir=heads, threads=1, max_active=2, max_rows=4
            )

    return make


AT_START = {"store.open", "store.load"}
"""Failpoints that a server reaches before it accepts requests."""

ACTIONS = ("raise", "raise:panic", "delay:0.02", "hang")


def cases() -> Iterator[object]:
    """Yields each failpoint with each action. A panic is the harder kind of exception, and a hang the longest delay."""
    for name in sorted(FAILPOINTS):
        for action in ACTIONS:
            marks = [] if action in ("raise:panic", "hang") else [pytest.mark.slow]
            yield pytest.param(name, action, marks=marks)


@pytest.mark.parametrize(("name", "action"), list(cases()))
async def test_a_fault_breaks_no_promise(
    name: str, action: str, make_engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """During the fault, calls end or fail with a reason. After a restart without it, every generation has one end."""
    # Failing writes are not waited for.
    monkeypatch.setattr(state_writer, "_PATIENCE_SECONDS", 0.05)
    history = History()
    with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as logs:
        with Faults([Fault.parse(f"{name}={action}")]) as faults:
            releasing = asyncio.get_running_loop().run_in_executor(None, release, faults)
            async with asyncio.timeout(PATIENCE):
                # A server that cannot start because of the fault accepts nothing.
                with contextlib.suppress(errors.StartupError, *((RuntimeError, Panic) if name in AT_START else ())):
                    await scenario(history, name, make_engine(), tmp_path, "during the fault")
            faults.reached.set()
            await releasing
        assert faults.hits[name], "the scenario does not reach the failpoint"
        async with asyncio.timeout(PATIENCE):
            await scenario(history, name, make_engine(), tmp_path, "afterwards")
    history.entries(logs)
    await history.store(tmp_path)
    assert [str(each) for each in violations(history)] == []


def release(faults: Faults) -> None:
    """Ends hangs soon after the first one, because those in the event loop also stop the test."""
    faults.reached.wait()
    faults.release()


def request(request_id: str = "") -> pb.GenerateRequest:
    """Returns a request for an image that is made even if its caller disconnects."""
    return pb.GenerateRequest(
        prompt="fox",
        seed=7,
        step_count=3,
        request_id=request_id,
        on_disconnect=pb.DISCONNECT_POLICY_KEEP,
        preview=pb.PreviewOptions(every_steps=1),
    )


async def scenario(history: History, name: str, engine, folder: Path, when: str) -> None:
    """Starts a server with a state folder, generates images, repeats each request, watches all, and stops it."""
    transport = TRANSPORTS.get(name.partition(".")[0], "native")
    async with (
        Store.opened(folder) as store,
        running(engine, store=store, transport=transport, max_active=1, retained=RETAINED) as service,
    ):

        async def ask(number: int) -> None:
            """Sends a request, and repeats it."""
            request_id = f"{number} {when}"
            for _ in range(2):
                log = history.reader(request_id=request_id, recipe="fox")
                await read(log, service.stub.Generate(request(request_id)))

        # One runs, and the others wait.
        await asyncio.gather(*(ask(number) for number in range(3)))
        await service.generations.idle()
        for generation in list(service.generations.retained):
            log = history.reader(recipe="fox")
            await read(log, service.stub.Watch(pb.WatchRequest(generation_id=generation.id)))
        # These push the oldest ones out.
        for _ in range(RETAINED if name == "store.forget" else 0):
            await read(history.reader(recipe="fox"), service.stub.Generate(request()))
        await service.generations.idle()
        history.settled(active=service.admission.active, waiting=service.admission.waiting)
