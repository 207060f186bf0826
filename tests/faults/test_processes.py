"""A server process that exits or hangs at any failpoint: the next one keeps every promise."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from typing import TYPE_CHECKING

import httpx
import pytest

from calotype.v1 import calotype_pb2 as pb
from calotype.v1.calotype_pb2_grpc import GenerationServiceStub
from calotype_server.failpoints import FAILPOINTS
from support.faults import EXIT_CODE
from support.grpcweb import WebChannel
from support.history import History, read, violations
from support.http import EventStub
from support.process import FailingServerProcess, ServerProcess
from support.service import open_channel

if TYPE_CHECKING:
    from pathlib import Path

PATIENCE = 60
OPTIONS = ("--deterministic", "--log-format", "json")
OPTIONS += ("--max-active", "2", "--drain-seconds", "1")

REQUEST_IDS = ("0", "1", "2")

AT_START = {"store.open", "store.load"}
"""Failpoints that a server reaches before it accepts requests."""


def options_for(name: str, folder: Path) -> tuple[str, ...]:
    """Returns the flags of a server that reaches the failpoint."""
    # The image without a request id is the first one that is dropped; the request ids stay in use.
    retained = ("--retain-count", "3") if name == "store.forget" else ()
    return (*OPTIONS, *retained, "--state", str(folder))


def request(request_id: str) -> pb.GenerateRequest:
    """Returns a request for an image that is made even if its caller disconnects."""
    return pb.GenerateRequest(
        prompt="fox", seed=5, step_count=2, request_id=request_id, on_disconnect=pb.DISCONNECT_POLICY_KEEP
    )


async def call(history: History, server: ServerProcess, name: str, *request_ids: str) -> None:
    """Generates images at the same time on the port that reaches the failpoint; calls that hang are abandoned."""

    async def generate(request_id: str) -> None:
        log = history.reader(request_id=request_id, recipe="fox")
        if name.startswith("http"):
            client = httpx.AsyncClient(base_url=f"http://{server.web_address}/v1", timeout=None, trust_env=False)
            stub = EventStub(client, None)
        elif name.startswith("grpcweb"):
            stub = WebChannel(server.web_address).stub()
        else:
            stub = GenerationServiceStub(open_channel(server.address))
        try:
            async with asyncio.timeout(PATIENCE / 6):
                await read(log, stub.Generate(request(request_id)))
        except TimeoutError:
            log.left()
        except ConnectionError:
            log.refused()

    await asyncio.gather(*map(generate, request_ids))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("action", ["exit", "hang"])
@pytest.mark.parametrize("name", sorted(FAILPOINTS))
def test_a_process_that_stops_at_a_failpoint_keeps_its_promises(tmp_path: Path, name: str, action: str) -> None:
    """The server exits, or a thread hangs and it still obeys SIGTERM; its successor ends all work exactly once."""
    history = History()
    options = options_for(name, tmp_path / "state")
    is_ready, control = name not in AT_START, tmp_path / "faults"
    # The start itself reaches most failpoints as well, so the fault comes later.
    faults = ["--control", str(control)] if is_ready else [f"{name}={action}"]
    with FailingServerProcess(faults, *options, ready=is_ready) as server:
        if is_ready:
            control.write_text(f"{name}={action}")
            asyncio.run(call(history, server, name, ""))
            # Two run together, and the third one waits.
            asyncio.run(call(history, server, name, *REQUEST_IDS))
        else:
            server.wait_for_log("fault injected", timeout=PATIENCE)
        if action == "hang":
            server.terminate()
        code = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = server.process.wait(PATIENCE)
        if action == "hang":
            # A loop that hangs handles no signal; the liveness probe fails, and the supervisor kills the process.
            if not any("fault injected" in line and "event loop" in line for line in server.log):
                history.stopped(code)
        else:
            assert code == EXIT_CODE
        server.process.kill()
        server.process.wait()
        server.join_log()
    history.log(server.log)
    assert any(kind.startswith(f"fault {name} {action}") for kind in history.tried), "the failpoint was not reached"
    history.crashed()
    with ServerProcess(*options) as server:
        asyncio.run(call(history, server, "", *REQUEST_IDS))
        server.terminate()
        history.stopped(server.process.wait(PATIENCE))
        server.join_log()
    history.log(server.log)
    asyncio.run(history.store(tmp_path / "state"))
    assert [str(each) for each in violations(history)] == []
