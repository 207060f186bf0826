"""The paths of the web port that need no key are exactly those in SECURITY.md."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from support.engine.fake_engine import FakeEngine
from support.grpcweb import Connection, frame, read_answer
from support.keyring import Keyring
from support.service import running

if TYPE_CHECKING:
    from calotype_server.transport.web.server import WebServer

SECURITY = Path(__file__).parents[2].joinpath("SECURITY.md").read_text("utf-8")


def documented() -> list[str]:
    """Returns the patterns in the table of open paths."""
    section = SECURITY.partition("## Open without a key")[2].partition("\n## ")[0]
    return [path for row in section.splitlines() if row.startswith("| `") for path in re.findall("`([^`]+)`", row)]


class Recorder:
    """Records the names of the methods that are registered on it, like a gRPC server."""

    def __init__(self) -> None:
        self.methods: list[str] = []

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Ignores what `add_registered_method_handlers` receives, too."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """Records the methods of a service."""
        self.methods += [f"/{service}/{name}" for name in handlers]


def every_path(web: WebServer) -> dict[str, str]:
    """Returns every path of a port with its method, except those of gRPC."""
    found = {}
    for route in web._grpc_web._application.routes:
        api = getattr(route.app, "_application", None)
        if api is None:
            found[route.path or "/"] = "GET"
            continue
        for path, methods in api.openapi()["paths"].items():
            found[route.path + re.sub(r"\{[^}]+\}", "x", path)] = next(iter(methods)).upper()
        found |= {route.path + each.path: "GET" for each in web_sockets(api)}
    return found


def web_sockets(api: Any) -> list[Any]:
    """Returns the WebSocket routes, which OpenAPI does not describe."""
    return [
        route
        for included in api.routes
        for route in included.original_router.routes
        if type(route).__name__ == "APIWebSocketRoute"
    ]


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    """A file with one key."""
    keyring = Keyring(tmp_path / "keys.toml")
    keyring.add("alice")
    return keyring


async def test_every_http_path_needs_a_key_unless_documented(keyring: Keyring, tmp_path: Path) -> None:
    """Without a key, every other path answers 401, whether it exists or not below /v1."""
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "app.js").touch()
    (tmp_path / "index.html").touch()
    options = {"page": tmp_path}
    access = keyring.access()
    async with running(
        FakeEngine(), access=access, transport="sse", web=options, metrics=lambda _: (b"", "")
    ) as service:
        paths = every_path(service.channel) | {"/v1/unknown": "GET", "/v1/": "GET", "/assets/app.js": "GET"}
        assert {"/metrics", "/v1/ws", "/v1/generate", "/docs", "/healthz", "/"} <= set(paths)
        found = {}
        for path, method in paths.items():
            url = f"http://{service.address}{path}"
            found[path] = (await service.stub.client.request(method, url)).status_code
    patterns = documented()
    for path, status in found.items():
        is_open = any(fnmatch(path, pattern) for pattern in patterns)
        assert status == 200 if is_open else status == 401, (path, status)


async def test_every_grpc_method_needs_a_key_unless_documented(keyring: Keyring) -> None:
    """Without a key, every method ends with UNAUTHENTICATED on the web port, except those of health checks."""
    async with running(FakeEngine(), access=keyring.access(), transport="grpc-web") as service:
        recorder: Any = Recorder()
        service.services.add_to(recorder)
        assert len(recorder.methods) > 7
        for method in recorder.methods:
            if method.endswith("Health/Watch"):
                continue  # streams without end
            connection = await Connection.open(service.address)
            headers = {"host": service.address, "content-type": "application/grpc-web+proto"}
            await connection.request("POST", method, headers, frame(b""))
            _, trailers = read_answer(await connection.answer())
            connection.close()
            is_open = any(fnmatch(method, pattern) for pattern in documented())
            assert (trailers["grpc-status"] == "16") != is_open, method
