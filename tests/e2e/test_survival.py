"""A server that is killed in mid-stream and started again: the caller's iterator ends with the same picture."""

from __future__ import annotations

import contextlib
import socket

import pytest

import calotype
from support.process import ServerProcess

pytestmark = pytest.mark.e2e

STEPS = 40


def free_address() -> str:
    """An address that both servers can have, one after the other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.timeout(240)
@pytest.mark.parametrize("keeps_state", [False, True], ids=["forgets", "keeps-state"])
def test_a_killed_server_costs_time_and_nothing_else(tmp_path, keeps_state: bool) -> None:
    """With or without a state folder: one iterator, rising sequences, one end, the picture byte for byte."""
    address = free_address()
    options = ["--grpc-address", address, "--deterministic", "--max-batch-rows", "4", "--max-active", "2"]
    if keeps_state:
        options += ["--state", str(tmp_path / "state")]
    with calotype.Client(address) as client, contextlib.ExitStack() as servers:
        first = servers.enter_context(ServerProcess(*options))
        undisturbed = client.generate("a red apple", seed=5, steps=STEPS).result()
        generation, seen = client.generate("a red apple", seed=5, steps=STEPS), []
        for progress in generation:
            if progress.step >= 5 and first.process.poll() is None:
                killed_at = progress.step
                first.process.kill()
                first.process.wait()
                servers.enter_context(ServerProcess(*options))
            seen.append(progress)
    assert 5 <= killed_at < STEPS
    assert generation.result().data == undisturbed.data
    assert [progress.sequence for progress in seen] == sorted({progress.sequence for progress in seen})
    assert [progress.step for progress in seen] == sorted(progress.step for progress in seen)
    assert [progress.phase.ended for progress in seen].count(True) == 1


def test_a_client_that_is_gone_frees_the_slot_or_leaves_the_picture(tmp_path) -> None:
    """KEEP: the picture of a caller who left without a word is there for whoever watches."""
    with ServerProcess("--max-active", "1") as server, calotype.Client(server.address) as client:
        with calotype.Client(server.address) as leaver:
            for progress in leaver.generate("fox", steps=20, on_disconnect="keep"):
                if progress.step >= 2:
                    break
        assert client.watch(progress.generation_id).result().format == "png"
