"""Browsers' port as an operator sees it: beside the native one, and as a bridge in a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_status import rpc_status

from calotype.v1 import calotype_pb2 as pb
from calotype.v1.calotype_pb2_grpc import GenerationServiceStub
from support.grpcweb import Connection, WebChannel
from support.process import BridgeProcess, ServerProcess
from support.service import read_until

pytestmark = pytest.mark.e2e

BUF = str(Path(sys.executable).with_name("buf"))
PROTOS = str(Path(__file__).parents[2] / "protos")
RED_APPLE = pb.GenerateRequest(prompt="a red apple", seed=7, step_count=4)


def stub(address: str) -> GenerationServiceStub:
    """Speaks grpc-web."""
    return GenerationServiceStub(WebChannel(address))


async def get(address: str, path: str) -> int:
    """Returns the status of a plain request."""
    connection = await Connection.open(address)
    await connection.request("GET", path, {"host": address})
    head, _ = await connection.answer("GET")
    connection.close()
    return head.status_code


async def test_both_ports_draw_the_same_picture(server: ServerProcess) -> None:
    """Byte for byte, with a preview at every step."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        native = [message async for message in GenerationServiceStub(channel).Generate(RED_APPLE)]
    web = [message async for message in stub(server.web_address).Generate(RED_APPLE)]
    assert web[-1].image == native[-1].image
    assert len({message.image_step for message in web if message.image_kind == pb.IMAGE_KIND_PREDICTED}) >= 2
    assert await get(server.web_address, "/readyz") == 200


def test_buf_curl_reads_streams_and_error_details(server: ServerProcess) -> None:
    """A client that we did not write: it gets every message, and every violation with its details."""

    def curl(method: str, request: str) -> subprocess.CompletedProcess[str]:
        url = f"http://{server.web_address}/calotype.v1.GenerationService/{method}"
        command = [BUF, "curl", "--protocol", "grpcweb", "--schema", PROTOS, "-d", request, url]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert json.loads(curl("GetModel", "{}").stdout)["name"] == "bundled"
    stream = curl("Generate", '{"prompt": "a red apple", "step_count": 2}')
    assert (stream.returncode, stream.stdout.count("PHASE_SUCCEEDED")) == (0, 1)
    refused = curl("Generate", '{"width_px": 7}')
    # buf's exit code is eight times the status code.
    assert refused.returncode == 8 * grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert {detail["type"] for detail in json.loads(refused.stderr)["details"]} == {
        "google.rpc.BadRequest",
        "google.rpc.ErrorInfo",
    }


async def test_sigterm_lets_a_browsers_picture_finish(cache_dir: Path) -> None:
    """The stream under way ends with its image, and the exit code is 0."""
    with ServerProcess("--cache-dir", str(cache_dir)) as server:
        call = stub(server.web_address).Generate(pb.GenerateRequest(prompt="a red apple", step_count=60))
        await read_until(call, pb.PHASE_DENOISING)
        server.terminate()
        assert (await read_until(call, pb.PHASE_SUCCEEDED)).image
        assert await call.read() is grpc.aio.EOF
        assert server.process.wait(30) == 0


async def test_a_bridge_passes_everything_on_and_outlives_its_server(cache_dir: Path) -> None:
    """While the server is well, when it is killed in mid-stream, and after."""
    with (
        ServerProcess("--cache-dir", str(cache_dir)) as server,
        BridgeProcess("--upstream", server.address) as bridge,
    ):
        assert await get(bridge.web_address, "/readyz") == 200
        messages = [message async for message in stub(bridge.web_address).Generate(RED_APPLE)]
        assert messages[-1].phase == pb.PHASE_SUCCEEDED
        call = stub(bridge.web_address).Generate(pb.GenerateRequest(prompt="a red apple", step_count=150))
        await read_until(call, pb.PHASE_DENOISING)
        server.process.kill()
        for broken in (call, stub(bridge.web_address).Generate(RED_APPLE)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                while await broken.read() is not grpc.aio.EOF:
                    pass
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            info = ErrorInfo()
            assert rpc_status.from_call(caught.value).details[0].Unpack(info)
            assert (info.reason, info.domain) == ("UPSTREAM_UNAVAILABLE", "calotype")
            assert server.address not in caught.value.details()
        assert await get(bridge.web_address, "/healthz") == 200
        assert await get(bridge.web_address, "/readyz") == 503
        bridge.process.send_signal(signal.SIGTERM)
        assert bridge.process.wait(30) == 0


def test_the_bridge_needs_no_model_libraries() -> None:
    """Its command is there, and its modules load, where torch, diffusers and transformers are missing."""
    code = """
import json, sys
for name in ("torch", "diffusers", "transformers", "accelerate"):
    sys.modules[name] = None
import typer
from calotype_server import bridge, cli
app = typer.Typer()
cli.register(app)
print(json.dumps([command.name for command in app.registered_commands]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "bridge" in json.loads(done.stdout)


@pytest.mark.parametrize(
    "options", [("--web-address", "nonsense"), ("--allowed-origins", "example.com"), ("--allowed-hosts", "http://x")]
)
def test_wrong_web_settings_are_explained(options: tuple[str, str]) -> None:
    """With the flag, by both commands."""
    for command in ("serve", "bridge"):
        done = subprocess.run(
            [sys.executable, "-m", "calotype", command, *options],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 2
        assert options[0] in done.stderr
