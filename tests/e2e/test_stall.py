"""A device thread that hangs, in a real process with the real model."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import pytest

import calotype
from calotype_server.generations.watchdog import EXIT_STALLED
from support.process import ServerProcess

pytestmark = pytest.mark.e2e

SCRIPT = Path(__file__).parents[1] / "support" / "hangs" / "hanging_server.py"
PROMPT = "unmistakable apple"


class HangingServer(ServerProcess):
    """Runs `calotype serve` with a denoiser that can be made to hang."""

    calotype = (sys.executable, "-P", str(SCRIPT))


def test_a_hung_device_ends_the_process_after_typed_ends(cache_dir: Path, tmp_path: Path) -> None:
    """Callers get a typed end, the log has stacks and ids but no prompt, and the exit code informs the supervisor."""
    hang = tmp_path / "hang"
    options = (
        "--cache-dir",
        str(cache_dir),
        "--watchdog-seconds",
        "2",
        "--log-format",
        "json",
        "--state",
        str(tmp_path),
    )
    with HangingServer(*options, HANG_WHEN=str(hang)) as server, calotype.Client(server.address, retries=0) as client:
        first = client.generate(PROMPT, steps=4)
        first.result()
        hang.touch()
        with pytest.raises(calotype.CalotypeError) as caught:
            client.generate(PROMPT, steps=4).result()
        assert caught.value.reason == "ENGINE_STALLED"
        assert server.process.wait(30) == EXIT_STALLED
        server._reader.join(10)
        lines = [json.loads(line) for line in server.log]
    assert PROMPT not in "".join(server.log)
    [ending] = [line for line in lines if "stacks" in line]
    assert any(frame.endswith(" _hanging_forward") for frame in ending["stacks"]["calotype-device"])
    assert any(name.startswith("calotype-generation") for name in ending["stacks"])
    [stalled] = [line for line in lines if line["event"] == "generation stalled"]
    assert stalled["seconds"] >= 2
    accepted = {line["generation"]: line["request"] for line in lines if line["event"] == "generation accepted"}
    warnings = [line for line in lines if line["event"] == "a slow kernel"]
    warned = {(line["generation"], line["request"]) for line in warnings if "request" in line}
    assert warned == set(accepted.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "hurried"),
    [
        ("store.call", False),
        ("encoder.final", True),
        ("engine.run", False),
        ("engine.step", True),
        ("engine.batch", True),
        ("engine.preview", False),
    ],
)
def test_sigterm_ends_a_process_that_hangs(cache_dir: Path, tmp_path: Path, point: str, hurried: bool) -> None:
    """The caller gets an end, and the process exits with code 70, although a thread hangs that cannot be joined."""
    hang = tmp_path / "hang"
    options = ("--cache-dir", str(cache_dir), "--state", str(tmp_path / "state"), "--state-timeout-seconds", "1")
    drain = ("--drain-seconds", "3600" if hurried else "1")
    reasons: list[str] = []
    with (
        HangingServer(*options, *drain, HANG_WHEN=str(hang), HANG_POINT=point) as server,
        calotype.Client(server.address, retries=0) as client,
    ):
        client.generate(PROMPT, steps=2).result()

        def generate() -> None:
            try:
                client.generate(PROMPT, steps=2).result()
            except calotype.CalotypeError as error:
                reasons.append(error.reason)

        hang.touch()
        calling = threading.Thread(target=generate)
        calling.start()
        server.wait_for_log("this thread hangs")
        server.terminate()
        server.wait_for_log("draining")
        if hurried:
            server.terminate()
        assert server.process.wait(60) == EXIT_STALLED
        calling.join(20)
    assert reasons == ["STATE_UNAVAILABLE" if point == "store.call" else "DRAINING"]
