"""The web port apart from calls: allowed origins and hosts, the page, health checks, and bad connections."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from typing import TYPE_CHECKING, Any

import h11
import pytest

from calotype_server.auth.access import Access
from calotype_server.errors import AddressInUse
from calotype_server.limits import PortLimits
from calotype_server.transport.web.server import WebServer
from calotype_server.transport.web.sockets import listen
from support.grpcweb import Connection, frame, header_dict, read_answer
from support.lab import NAME, PATIENCE, echo, lab

if TYPE_CHECKING:
    from pathlib import Path

APP = "https://app.example"
EVIL = "https://evil.example"


class Caller:
    """A method for a lab, and the number of its calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.methods = {"Call": self.call}

    async def call(self, request, context):
        """Counts the call and answers it."""
        self.calls += 1
        yield b"answer"


async def ask(address: str, method: str, path: str, body: bytes | None = None, **given: str):
    """Sends a request and returns the status, headers and body of the response."""
    connection = await Connection.open(address)
    headers = {name.replace("_", "-"): value for name, value in given.items()}
    await connection.request(method, path, {"host": address, **headers}, body)
    head, answer = await connection.answer(method)
    connection.close()
    return head.status_code, {name.decode(): value.decode() for name, value in head.headers}, answer


async def call(address: str, **given: str):
    """Calls the method."""
    given = {"content_type": "application/grpc-web", **given}
    return await ask(address, "POST", f"/{NAME}/Call", frame(b""), **given)


async def preflight(address: str, origin: str, headers: str = "content-type,x-grpc-web,x-user-agent,grpc-timeout"):
    """Sends the CORS preflight request of a browser before a call across origins."""
    return await ask(
        address,
        "OPTIONS",
        f"/{NAME}/Call",
        origin=origin,
        access_control_request_method="POST",
        access_control_request_headers=headers,
    )


async def test_an_allowed_page_may_call() -> None:
    """The preflight allows the headers that it asks for, and the response names only the page's own origin."""
    caller = Caller()
    async with lab(methods=caller.methods, allowed_origins=[APP]) as server:
        status, headers, _ = await preflight(server.address, APP)
        assert status == 200
        assert headers["access-control-allow-origin"] == APP
        assert "POST" in headers["access-control-allow-methods"]
        allowed = {name.strip().lower() for name in headers["access-control-allow-headers"].split(",")}
        assert allowed == {"content-type", "x-grpc-web", "x-user-agent", "grpc-timeout"}
        assert int(headers["access-control-max-age"]) > 0
        status, headers, body = await call(server.address, origin=APP)
    assert (status, headers["access-control-allow-origin"], caller.calls) == (200, APP, 1)
    assert "Origin" in headers["vary"]
    assert "access-control-allow-credentials" not in headers
    assert b"answer" in body


@pytest.mark.parametrize("origins", [[], [APP]])
@pytest.mark.parametrize(
    "origin", [EVIL, "null", "http://[::1", f"{APP}.evil.example", "https://localhost:1", f"{APP}:444"]
)
async def test_other_pages_are_rejected_before_the_handler(origins: list[str], origin: str) -> None:
    """Both the preflight request and a call without preflight are rejected."""
    caller = Caller()
    async with lab(methods=caller.methods, allowed_origins=origins) as server:
        for status, headers, _ in (await preflight(server.address, origin), await call(server.address, origin=origin)):
            assert status == 403
            assert "access-control-allow-origin" not in headers
    assert caller.calls == 0


@pytest.mark.parametrize("origins", [[APP], ["*"]])
async def test_an_allowed_page_may_send_any_header(origins: list[str]) -> None:
    """OpenAI's SDK, tracing and gRPC's metadata add headers of their own. Preflight requests need no key."""
    sent = "authorization,content-type,x-stainless-lang,x-stainless-retry-count,baggage,tracestate,my-metadata-bin"
    async with lab(allowed_origins=origins) as server:
        status, headers, _ = await preflight(server.address, APP, sent)
        assert (status, headers["access-control-allow-headers"]) == (200, sent)
        assert headers["access-control-allow-origin"] in (APP, "*")
        assert "Access-Control-Request-Headers" in headers["vary"]
        plain = await ask(server.address, "GET", "/healthz", origin=APP)
    readable = plain[1]["access-control-expose-headers"].split(", ")
    assert {"grpc-status", "retry-after", "x-request-id", "x-should-retry", "allow"} <= set(readable)


async def test_an_allowed_page_on_the_internet_may_call_a_server_in_a_local_network() -> None:
    """Chromium asks for that separately."""
    async with lab(allowed_origins=[APP]) as server:
        _, headers, _ = await ask(
            server.address,
            "OPTIONS",
            "/healthz",
            origin=APP,
            access_control_request_method="GET",
            access_control_request_private_network="true",
        )
    assert headers["access-control-allow-private-network"] == "true"


async def test_the_servers_own_page_may_call() -> None:
    """Browsers send Origin for the server's own page, too."""
    caller = Caller()
    async with lab(methods=caller.methods) as server:
        port = server.address.rpartition(":")[2]
        for host in (server.address, f"localhost:{port}", f"[::1]:{port}", "LOCALHOST"):
            assert (await call(server.address, host=host, origin=f"http://{host.lower()}"))[0] == 200
    assert caller.calls == 4


async def test_a_star_allows_every_page() -> None:
    """With "*" every origin may call, but not with cookies."""
    async with lab(methods=Caller().methods, allowed_origins=["*"]) as server:
        status, headers, _ = await call(server.address, origin=EVIL)
    assert (status, headers["access-control-allow-origin"]) == (200, "*")
    assert "access-control-allow-credentials" not in headers


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example", "[::1", "a@b:c", ""],
)
async def test_a_foreign_host_name_is_rejected(host: str) -> None:
    """DNS rebinding makes a foreign page look like the same origin; this is checked for calls and the page."""
    caller = Caller()
    async with lab(methods=caller.methods) as server:
        assert (await call(server.address, host=host, origin=f"http://{host}"))[0] == 421
        assert (await ask(server.address, "GET", "/", host=host))[0] == 421
    assert caller.calls == 0


@pytest.mark.parametrize("allowed", ["pictures.example", "*"])
async def test_the_operator_can_allow_host_names(allowed: str) -> None:
    """The comparison ignores upper case and ports."""
    async with lab(methods=Caller().methods, allowed_hosts=[allowed]) as server:
        assert (await call(server.address, host="Pictures.Example:8443"))[0] == 200


async def test_health_checks() -> None:
    """/healthz always succeeds; /readyz succeeds when the server is ready."""
    ready = False

    async def is_ready() -> bool:
        return ready

    async with lab(is_ready=is_ready) as server:
        assert (await ask(server.address, "GET", "/healthz"))[::2] == (200, b"ok\n")
        assert (await ask(server.address, "GET", "/readyz"))[0] == 503
        ready = True
        assert (await ask(server.address, "GET", "/readyz"))[0] == 200


async def test_the_page_is_served(tmp_path: Path) -> None:
    """The files of the page are served, files outside of its folder are not, and calls still work."""
    folder = tmp_path / "page"
    (folder / "assets").mkdir(parents=True)
    (folder / "index.html").write_text("<h1>Calotype</h1>")
    (folder / "assets" / "app.js").write_text("go()")
    (tmp_path / "secret").write_text("secret")
    async with lab(methods=Caller().methods, page=folder) as server:
        status, headers, body = await ask(server.address, "GET", "/")
        assert (status, body) == (200, b"<h1>Calotype</h1>")
        assert headers["content-type"].startswith("text/html")
        assert (await ask(server.address, "GET", "/assets/app.js"))[::2] == (200, b"go()")
        for path in ("/../secret", "/%2e%2e/secret", "/assets/../../secret", "/nothing"):
            status, _, body = await ask(server.address, "GET", path)
            assert (status, b"secret" in body) == (404, False)
        assert (await call(server.address))[0] == 200


async def test_without_a_page_the_root_explains_itself(tmp_path: Path) -> None:
    """A visitor gets a sentence instead of an error."""
    async with lab(page=tmp_path / "missing") as server:
        status, _, body = await ask(server.address, "GET", "/")
    assert status == 200
    assert b"without its web page" in body


@pytest.mark.parametrize("ending", ["\r\n\r\n", ""])
async def test_a_large_request_head_is_rejected(ending: str) -> None:
    """A complete and an endless head above the limit get 400."""
    async with lab() as server:
        connection = await Connection.open(server.address)
        await connection.send(f"GET / HTTP/1.1\r\nhost: localhost\r\nx: {'x' * 40_000}{ending}".encode())
        head, _ = await connection.answer("GET")
        connection.close()
    assert head.status_code == 400


async def test_a_silent_connection_is_closed() -> None:
    """A connection without a request, or with an incomplete head, is closed after the timeout."""
    async with lab(limits=PortLimits(request_seconds=0.05)) as server:
        for start in (b"", b"GET / HT"):
            connection = await Connection.open(server.address)
            await connection.send(start)
            with contextlib.suppress(ConnectionResetError):
                assert await asyncio.wait_for(connection.reader.read(), PATIENCE) == b""
            connection.close()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other options")
def test_accepted_connections_detect_dead_peers_and_have_small_buffers() -> None:
    """Accepted connections inherit the options of the listening socket."""
    [listening] = listen("127.0.0.1:0")
    with listening:
        listening.listen()
        with socket.create_connection(listening.getsockname()), listening.accept()[0] as accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 20
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 20_000
            # The kernel doubles the requested size.
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 512 * 1024


async def test_an_address_in_use_is_an_error() -> None:
    """The error names the option, also if only one address of a name is in use."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for host in ("127.0.0.1", "localhost"):
            address = f"{host}:{taken.getsockname()[1]}"
            server = WebServer(address, lambda _: None, Access(), is_ready=None)
            with pytest.raises(AddressInUse, match="--web-address"):
                await server.start()
            await server.stop(0)


async def test_localhost_listens_on_all_its_addresses() -> None:
    """One free port is chosen for all addresses of localhost."""
    server = WebServer("localhost:0", lambda _: None, Access(), is_ready=None)
    address = await server.start()
    port = int(address.rpartition(":")[2])
    try:
        for found in socket.getaddrinfo("localhost", port, type=socket.SOCK_STREAM):
            status, _, _ = await ask(f"{found[4][0]}:{port}", "GET", "/healthz", host=address)
            assert status == 200
    finally:
        await server.stop(0)


async def test_a_websocket_on_another_path_is_rejected() -> None:
    """A valid handshake gets 403 on paths without a WebSocket and without the API; an invalid one gets 400."""
    good: dict[str, Any] = {"connection": "upgrade", "upgrade": "websocket", "sec_websocket_version": "13"}
    async with lab() as server:
        for path in ("/healthz", "/v1/ws"):
            status, _, _ = await ask(server.address, "GET", path, **good, sec_websocket_key="dGhlIHNhbXBsZSBub25jZQ==")
            assert status == 403
        assert (await ask(server.address, "GET", "/healthz", **good))[0] == 400


async def test_idle_connections_do_not_delay_a_stop() -> None:
    """Stopping closes idle connections."""
    async with lab(methods=Caller().methods) as server:
        connection = await server.post("Call")
        head, _ = await connection.answer()
        assert head.status_code == 200
        await asyncio.wait_for(server.server.stop(PATIENCE), PATIENCE)
        assert await connection.reader.read() == b""
        connection.close()


async def test_a_draining_port_ends_each_connection_after_its_response() -> None:
    """Clients behind a load balancer then connect to another server; until then, they get their responses."""
    async with lab(methods={"Echo": echo}) as server:
        connection = await server.post("Echo")
        head, _ = await connection.answer()
        assert "connection" not in header_dict(head)
        server.server.drain()
        connection.next_answer()
        kind = {"host": server.address, "content-type": "application/grpc-web"}
        await connection.request("POST", f"/{NAME}/Echo", kind, frame(b"x"))
        head = await connection.event()
        body = b""
        while isinstance(event := await connection.event(), h11.Data):
            body += event.data
        assert header_dict(head)["connection"] == "close"
        assert read_answer((head, body))[0] == [b"x"]
        assert await connection.reader.read() == b""
        connection.close()
