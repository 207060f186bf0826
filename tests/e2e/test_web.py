"""The web port of a real server, and of a bridge in its own process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def stub(address: str) -> Any:
    """Returns a stub that speaks grpc-web."""
    return WebChannel(address).stub()


async def get(address: str, path: str) -> int:
    """Returns the HTTP status of a GET request."""
    connection = await Connection.open(address)
    await connection.request("GET", path, {"host": address})
    head, _ = await connection.answer("GET")
    connection.close()
    return head.status_code


async def test_both_ports_return_the_same_image(server: ServerProcess) -> None:
    """The images are equal byte for byte, and the web stream has previews."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        native = [message async for message in GenerationServiceStub(channel).Generate(RED_APPLE)]
    web = [message async for message in stub(server.web_address).Generate(RED_APPLE)]
    assert web[-1].image == native[-1].image
    assert len({message.image_step for message in web if message.image_kind == pb.IMAGE_KIND_PREDICTED}) >= 2
    assert await get(server.web_address, "/readyz") == 200


def test_buf_curl_reads_streams_and_error_details(server: ServerProcess) -> None:
    """`buf curl`, an independent client, receives all messages, and all violations with their details."""

    def curl(method: str, request: str) -> subprocess.CompletedProcess[str]:
        url = f"http://{server.web_address}/calotype.v1.GenerationService/{method}"
        command = [BUF, "curl", "--protocol", "grpcweb", "--schema", PROTOS, "-d", request, url]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert json.loads(curl("GetModel", "{}").stdout)["name"] == "bundled"
    stream = curl("Generate", '{"prompt": "a red apple", "step_count": 2}')
    assert (stream.returncode, stream.stdout.count("PHASE_SUCCEEDED")) == (0, 1)
    rejected = curl("Generate", '{"width_px": 7}')
    # buf's exit code is eight times the status code.
    assert rejected.returncode == 8 * grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert {detail["type"] for detail in json.loads(rejected.stderr)["details"]} == {
        "google.rpc.BadRequest",
        "google.rpc.ErrorInfo",
    }


async def test_sigterm_completes_an_active_browser_stream(cache_dir: Path) -> None:
    """The active stream ends with its image, and the exit code is 0."""
    with ServerProcess("--cache-dir", str(cache_dir)) as server:
        call = stub(server.web_address).Generate(pb.GenerateRequest(prompt="a red apple", step_count=60))
        await read_until(call, pb.PHASE_DENOISING)
        server.terminate()
        assert (await read_until(call, pb.PHASE_SUCCEEDED)).image
        assert await call.read() is grpc.aio.EOF
        assert server.process.wait(30) == 0


async def test_a_bridge_forwards_calls_and_survives_its_server(cache_dir: Path) -> None:
    """Calls succeed while the server runs, and fail with UPSTREAM_UNAVAILABLE when it is killed during a stream."""
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
    """The bridge command loads without torch, diffusers and transformers."""
    code = """
import json, sys
for name in ("torch", "diffusers", "transformers", "accelerate"):
    sys.modules[name] = None
import typer
from calotype_server.apps import bridge
from calotype_server.cli.main import register
app = typer.Typer()
register(app)
print(json.dumps([command.name for command in app.registered_commands]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "bridge" in json.loads(done.stdout)


@pytest.mark.parametrize(
    "options", [("--web-address", "nonsense"), ("--allowed-origins", "example.com"), ("--allowed-hosts", "http://x")]
)
def test_errors_in_web_settings_name_the_option(options: tuple[str, str]) -> None:
    """`serve` and `bridge` exit with 2 and name the option."""
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
