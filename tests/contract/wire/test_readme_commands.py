"""The commands and programs of protos/README.md work, as they are, against a running server."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from calotype.v1 import calotype_pb2 as pb
from support.engine.fake_engine import FakeEngine
from support.examples import EXAMPLES
from support.lab import PATIENCE
from support.service import read_until, running

ROOT = Path(__file__).parents[3]
README = (ROOT / "protos" / "README.md").read_text(encoding="utf-8")
[CURL] = re.findall(r"```sh\n(buf curl .*?)```", README, re.DOTALL)
[GRPC_JS] = [block for block in re.findall(r"```js\n(.*?)```", README, re.DOTALL) if ".cancel()" in block]

PROGRAM = """
import {{ credentials, loadPackageDefinition }} from "@grpc/grpc-js";
import {{ loadSync }} from "@grpc/proto-loader";

const types = loadSync("calotype/v1/calotype.proto", {{ includeDirs: [{protos}] }});
const {{ GenerationService }} = loadPackageDefinition(types).calotype.v1;
const client = new GenerationService({address}, credentials.createInsecure());
const prompt = "a red apple";
{snippet}
// Travels on the same connection, so a cancel arrives before it.
client.getModel({{}}, () => console.log("left"));
process.stdin.resume();
"""


async def output_of(*command: str, cwd: Path = ROOT) -> asyncio.subprocess.Process:
    """Starts a program with the tools of this environment on its path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return await asyncio.create_subprocess_exec(
        *command,
        cwd=cwd,
        env={**os.environ, "PATH": path},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )


async def test_buf_curl_generates_an_image_without_the_proto() -> None:
    """The command of the README uses server reflection and prints every message as JSON."""
    async with running(FakeEngine()) as service:
        process = await output_of("sh", "-ec", CURL.replace("localhost:50051", service.address))
        printed, _ = await asyncio.wait_for(process.communicate(), PATIENCE)
    assert process.returncode == 0, printed
    decoder, text, messages = json.JSONDecoder(), printed.decode(), []
    while text:
        message, end = decoder.raw_decode(text)
        messages.append(message)
        text = text[end:].lstrip()
    assert messages[-1]["phase"] == "PHASE_SUCCEEDED"
    assert messages[-1]["image"]


@pytest.mark.slow
@pytest.mark.parametrize("cancels", [True, False], ids=["finally", "break alone"])
async def test_leaving_a_loop_cancels_in_grpc_js_only_with_finally(cancels: bool) -> None:
    """The program of the README ends its generation; without its `finally`, the generation continues."""
    if shutil.which("node") is None:
        pytest.skip("Node is not installed")
    await asyncio.to_thread(EXAMPLES["node"].build)
    snippet = GRPC_JS if cancels else GRPC_JS.replace("call.cancel();", "")
    engine = FakeEngine()
    engine.hold()
    async with running(engine) as service:
        program = PROGRAM.format(
            protos=json.dumps(str(ROOT / "protos")), address=json.dumps(service.address), snippet=snippet
        )
        process = await output_of("node", "--input-type=module", "-e", program, cwd=ROOT / "client" / "node")
        async with asyncio.timeout(PATIENCE):
            while not service.generations.running:  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(0.01)
            generation = service.generations.running[0]
            engine.allow(1)
            assert await process.stdout.readline() == b"left\n"
            if cancels:
                while generation.readers:  # noqa: ASYNC110 - there is no event to wait for
                    await asyncio.sleep(0.01)
            else:
                assert generation.readers
                engine.allow()
                watch = service.stub.Watch(pb.WatchRequest(generation_id=generation.id))
                await read_until(watch, pb.PHASE_SUCCEEDED)
        process.kill()
        await process.communicate()
