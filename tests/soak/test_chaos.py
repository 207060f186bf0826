"""Cuts connections, injects faults and kills the server repeatedly while callers reconnect: `make soak`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import subprocess
from typing import TYPE_CHECKING

import pytest

import calotype
from calotype.v1 import calotype_pb2 as pb
from soak.report import report, settle
from support.grpcweb import WebChannel
from support.history import History, follow, read
from support.keyring import Keyring
from support.process import FailingServerProcess, free_address
from support.proxy import Link

if TYPE_CHECKING:
    from pathlib import Path

SECONDS = float(os.environ.get("SECONDS", "120"))
SEED = int(os.environ.get("SEED", "0"))
CALLERS = 4
"""Callers on each port. They use two keys and compete for the slots."""
PATIENCE = 300.0
"""Seconds after which a generation counts as stuck."""
SETTLE = 120.0
"""Seconds in which the last server finishes the generations that it restored."""
LIFE = 12.0
"""Seconds after which the server is killed."""
POLICIES = ("cancel", "keep", "grace")
PROMPTS = ("a red apple", "fox", "banana", "umbrella")
STEPS = 12
FAULTS = (
    "",
    "",
    "store.end=raise:full",
    "store.accept=raise:full",
    "store.accept=raise:full store.end=raise:full",
    "store.accept=delay:0.2 store.end=delay:0.2",
    "store.end=exit%0.05",
    "encoder.preview=raise%0.05 encoder.final=raise%0.05",
    "encoder.preview=delay:0.1%0.2 encoder.final=delay:0.3",
    "engine.run=raise:memory%0.2",
    "engine.step=raise%0.01",
    "engine.step=raise:panic%0.005",
    "engine.step=delay:0.1%0.2",
    "engine.step=exit%0.003",
    "runner.start=raise%0.1",
    "grpc.message=raise%0.02 grpcweb.message=raise%0.02",
    "grpc.call=raise%0.1 grpcweb.call=raise%0.1",
)
"""One of these phases after another, each for some seconds."""


def terms(policy: str) -> dict:
    """Returns the options for what happens to a generation without readers."""
    options: dict[str, dict[str, object]] = {
        "cancel": {},
        "keep": {"on_disconnect": "keep"},
        "grace": {"disconnect_grace": 1.0},
    }
    return options[policy]


class Chaos:
    """The callers, the server, and the trouble between them.

    Args:
        folder: For state, keys and faults.
    """

    def __init__(self, folder: Path) -> None:
        self.history = History()
        self.chance = random.Random(SEED)
        self.address, self.web_address, self.metrics_address = free_address(), free_address(), free_address()
        keyring = Keyring(folder / "keys")
        self.keys = {name: keyring.add(name) for name in ("a", "b")}
        self._state = ["--state", str(folder / "state")]
        self.state = folder / "state"
        self._control = folder / "faults"
        self._options = ["--grpc-address", self.address, "--web-address", self.web_address, "--deterministic"]
        self._options += ["--metrics-address", self.metrics_address, "--api-keys", str(keyring.path)]
        self._options += ["--log-format", "json", "--max-batch-rows", "8", "--max-active", "4"]
        self._servers = contextlib.ExitStack()
        self._replica = ""
        self.kills = 0

    async def start(self, *, keeps_state: bool) -> None:
        """Starts a server; without its state it has forgotten everything."""
        faults = ["--control", str(self._control), "--seed", str(SEED + self.kills)]
        options = [*self._options, *(self._state if keeps_state else [])]
        self.server = FailingServerProcess(faults, *options)
        await asyncio.to_thread(self._servers.enter_context, self.server)
        async with calotype.AsyncClient(self.address, api_key=self.keys["a"]) as client:
            self._replica = "" if keeps_state else (await client.model()).replica

    async def replace(self, *, keeps_state: bool) -> None:
        """Kills the server, unless a fault has ended it, and starts another one."""
        self.inject("")
        if self.server.process.poll() is None:
            self.server.process.kill()
            self.history.tried["kill -9"] += 1
        await asyncio.to_thread(self.server.process.wait)
        await self._collect()
        self.history.crashed(forgets=self._replica)
        # The store forgets an end after a while, and this process may have been killed before anyone else saw it.
        await self.history.store(self.state)
        self.kills += 1
        await self.start(keeps_state=keeps_state)

    async def stop(self) -> None:
        """Stops the last server with SIGTERM."""
        self.server.terminate()
        try:
            code = await asyncio.to_thread(self.server.process.wait, 60)
        except subprocess.TimeoutExpired:
            code = None
        await self._collect()
        self.history.stopped(code)
        self._servers.close()

    async def _collect(self) -> None:
        await asyncio.to_thread(self.server.join_log)
        self.history.log(self.server.log)

    def inject(self, faults: str) -> None:
        """Replaces the faults of the running server."""
        self._control.write_text(faults)

    async def native(self, client: calotype.AsyncClient, key: str, prompt: str, policy: str) -> None:
        """Generates an image with the Python client, which reconnects automatically."""
        generation = client.generate(prompt, seed=5, steps=STEPS, **terms(policy))
        try:
            await follow(self.history, generation, caller=key, recipe=prompt)
        except calotype.CalotypeError as error:
            # A client reports a failed first contact immediately; faults end the others.
            self.history.tried[f"caller {key} received {error.reason or 'a broken connection'}"] += 1
            await asyncio.sleep(0.1)
        else:
            self.history.tried[f"caller {key} received an image, native, {policy}"] += 1

    async def web(self, channel: WebChannel, key: str, prompt: str, policy: str, request_id: str) -> None:
        """Generates an image without a Calotype client: repeats the request with the same id until it ends."""
        request = pb.GenerateRequest(prompt=prompt, seed=5, step_count=STEPS, request_id=request_id)
        if policy == "keep":
            request.on_disconnect = pb.DISCONNECT_POLICY_KEEP
        if policy == "grace":
            request.disconnect_grace.seconds = 1
        metadata = (("authorization", f"Bearer {self.keys[key]}"),)
        while True:
            log = self.history.reader(caller=key, request_id=request_id, recipe=prompt)
            if await read(log, channel.stub().Generate(request, metadata=metadata)):
                self.history.tried[f"caller {key} received an image, web, {policy}"] += 1
                return
            if log.outcome and log.outcome not in ("ABANDONED", "DRAINING", "STATE_UNAVAILABLE"):
                self.history.tried[f"caller {key} received {log.outcome}"] += 1
                return
            await asyncio.sleep(0.1)


@pytest.mark.timeout(7200)
async def test_every_generation_ends_correctly_despite_cuts_crashes_and_faults(tmp_path: Path) -> None:
    """On both ports, with every policy and for both keys, the whole history keeps the invariants."""
    chaos = Chaos(tmp_path)
    loop, chance, history = asyncio.get_running_loop(), chaos.chance, chaos.history
    async with Link(chaos.address) as link, Link(chaos.web_address) as web_link:
        await chaos.start(keeps_state=True)
        until = loop.time() + SECONDS

        async def caller(port: str, number: int) -> None:
            key = "ab"[number % 2]
            channel = WebChannel(web_link.address)
            async with calotype.AsyncClient(link.address, api_key=chaos.keys[key], retries=1000) as client:
                for turn in range(1_000_000):
                    if loop.time() > until:
                        break
                    prompt, policy = chance.choice(PROMPTS), chance.choice(POLICIES)
                    async with asyncio.timeout(PATIENCE):
                        if port == "native":
                            await chaos.native(client, key, prompt, policy)
                        else:
                            await chaos.web(channel, key, prompt, policy, f"{number}-{turn}")
            channel.close()

        async def trouble() -> None:
            next_kill, next_fault = loop.time() + LIFE, loop.time()
            while loop.time() < until:
                await asyncio.sleep(chance.uniform(0.05, 0.8))
                chance.choice([link, web_link]).cut()
                if loop.time() > next_fault:
                    chaos.inject(chance.choice(FAULTS))
                    next_fault = loop.time() + chance.uniform(1, 4)
                if loop.time() > next_kill or chaos.server.process.poll() is not None:
                    # Every fourth server starts without its state and has lost everything.
                    await chaos.replace(keeps_state=chaos.kills % 4 != 2)
                    next_kill = loop.time() + LIFE
            await chaos.replace(keeps_state=True)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(trouble())
            for number in range(CALLERS):
                tasks.create_task(caller("native", number))
                tasks.create_task(caller("web", number))
        await settle(history, chaos.metrics_address, SETTLE)
        await chaos.stop()
        history.tried["cut connections"] = link.cuts + web_link.cuts
    await history.store(chaos.state)
    assert report(history, f"chaos for {SECONDS:.0f} s, seed {SEED}") == []
    assert history.tried["kill -9"]
    for key in chaos.keys:
        assert any(kind.startswith(f"caller {key} received an image") for kind in history.tried), key
