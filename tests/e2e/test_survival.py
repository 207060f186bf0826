"""Kills during a stream: after a server restart, the caller still gets the same image."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import calotype
from calotype_server.generations.ids import tag_of
from support.history import History, violations
from support.process import CALOTYPE, ServerProcess, free_address

pytestmark = pytest.mark.e2e

STEPS = 40


@pytest.mark.proves("python", "resumes")
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "keeps_state", [pytest.param(False, marks=pytest.mark.slow), True], ids=["forgets", "keeps-state"]
)
def test_a_stream_survives_a_killed_server(tmp_path, keeps_state: bool) -> None:
    """With and without a state folder, the loop continues with rising sequences, one end, and the same image."""
    address = free_address()
    options = ["--grpc-address", address, "--deterministic", "--max-batch-rows", "4", "--max-active", "2"]
    options += ["--log-format", "json"]
    if keeps_state:
        options += ["--state", str(tmp_path / "state")]
    history = History()
    log = history.reader(recipe="a red apple")
    with calotype.Client(address) as client, contextlib.ExitStack() as servers:
        first = servers.enter_context(ServerProcess(*options))
        undisturbed = client.generate("a red apple", seed=5, steps=STEPS).result()
        generation, seen = client.generate("a red apple", seed=5, steps=STEPS), []
        for progress in generation:
            log.saw(progress.generation_id, progress.sequence, progress.phase.value, progress.step)
            if progress.step >= 5 and first.process.poll() is None:
                killed_at = progress.step
                first.process.kill()
                first.process.wait()
                first.join_log()
                history.log(first.log)
                history.crashed(forgets="" if keeps_state else tag_of(progress.generation_id))
                second = servers.enter_context(ServerProcess(*options))
            seen.append(progress)
        log.ended(image=generation.result().data)
        second.terminate()
        history.stopped(second.process.wait(60))
        second.join_log()
        history.log(second.log)
    assert 5 <= killed_at < STEPS
    assert generation.result().data == undisturbed.data
    assert [progress.phase.ended for progress in seen].count(True) == 1
    asyncio.run(history.store(tmp_path / "state"))
    assert [str(each) for each in violations(history)] == []


class SlowLoadingProcess(ServerProcess):
    """A server that loads its model only after `load`."""

    calotype = (sys.executable, "-P", str(Path(__file__).parents[1] / "support" / "servers" / "slow_loading.py"))

    def __init__(self, *options: str, pipe: Path) -> None:
        super().__init__(*options, ready=False, LOAD_WHEN=str(pipe))
        self._pipe = pipe
        os.mkfifo(pipe)

    def load(self) -> None:
        """Lets the server load its model. Waits until it is about to."""
        self._pipe.open("wb").close()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_stream_survives_a_server_that_loads_for_longer_than_all_retries(tmp_path) -> None:
    """After kill -9, the client waits for a server that answers NOT_READY more often than the client retries."""
    address = free_address()
    options = ["--grpc-address", address, "--deterministic"]
    answers = []

    def note(error: calotype.CalotypeError, _: float) -> None:
        answers.append(error)
        if len(loading := [each for each in answers if each.reason == "NOT_READY"]) == 4:
            assert all(each.retry_after >= 1 for each in loading)
            second.load()

    with calotype.Client(address, retries=2, on_reconnect=note) as client, contextlib.ExitStack() as servers:
        first = servers.enter_context(ServerProcess(*options))
        undisturbed = client.generate("a red apple", seed=5, steps=STEPS).result()
        generation = client.generate("a red apple", seed=5, steps=STEPS)
        for progress in generation:
            if progress.step >= 5 and first.process.poll() is None:
                first.process.kill()
                first.process.wait()
                second = servers.enter_context(SlowLoadingProcess(*options, pipe=tmp_path / "pipe"))
                probe = calotype.Client(address, wait_for_server=60, loading_timeout=0)
                with probe, pytest.raises(calotype.Unavailable, match="loading"):
                    probe.model()
        assert generation.result().data == undisturbed.data
    assert len(answers) >= 5


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_generate_waits_for_a_server_that_is_started_at_the_same_time(tmp_path) -> None:
    """`calotype generate` waits for the port and for the model, says so on stderr, and saves the image."""
    address = free_address()
    command = [*CALOTYPE, "generate", "a red apple", "--steps", "2", "--address", address, "-o", "apple.png"]
    with subprocess.Popen([*command, "--wait", "60"], cwd=tmp_path, stderr=subprocess.PIPE, text=True) as caller:
        assert caller.stderr.readline() == f"No Calotype server answers at {address}; waiting ...\n"
        with SlowLoadingProcess("--grpc-address", address, pipe=tmp_path / "pipe") as server:
            assert caller.stderr.readline() == "The server is loading its model; waiting ...\n"
            server.load()
            assert caller.wait() == 0
        assert caller.stderr.read() == ""
    assert (tmp_path / "apple.png").exists()


CALLER = """
import sys, calotype
client = calotype.Client(sys.argv[1], retries=0)
for progress in client.generate("fox", seed=3, steps=150, on_disconnect=sys.argv[2]):
    if progress.step:
        print(progress.generation_id, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["cancel", "keep"])
def test_a_killed_client_frees_the_slot_or_leaves_the_image(policy: str) -> None:
    """With CANCEL the only slot is freed; with KEEP the image is finished and can be watched."""
    with ServerProcess("--max-active", "1") as server, calotype.Client(server.address) as client:
        command = [sys.executable, "-c", CALLER, server.address, policy]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as caller:
            generation_id = caller.stdout.readline().strip()
            caller.kill()
        if policy == "cancel":
            server.wait_for_log(generation_id, "outcome=ABANDONED")
            client.generate("a cat", steps=1).result()
        else:
            watched = client.watch(generation_id)
            assert watched.result().format == "png"
            assert watched.progress.step == 150
