"""The undocumented parts of uvicorn that the web port overrides or reads still exist and behave as expected.

If a test fails after an upgrade of uvicorn, check `uvicorn_server.py`, `http_protocol.py`, `websocket_protocol.py` and
`tls_handshake.py` in `transport/web` before raising the version cap in pyproject.toml.
"""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest
import uvicorn
from httptools import HttpParserError
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets import websockets_sansio_impl
from uvicorn.server import ServerState

from calotype_server.transport.web import uvicorn_server
from calotype_server.transport.web.http_protocol import HttpProtocol
from calotype_server.transport.web.sockets import listen
from calotype_server.transport.web.websocket_protocol import WebSocketProtocol

OVERRIDDEN = {
    "connection_made": ["self", "transport"],
    "data_received": ["self", "data"],
    "handle_websocket_upgrade": ["self"],
    "on_message_begin": ["self"],
    "on_header": ["self", "name", "value"],
    "on_headers_complete": ["self"],
    "on_body": ["self", "body"],
    "on_message_complete": ["self"],
    "on_response_complete": ["self"],
    "_start_asgi_task": ["self", "cycle", "app"],
    "connection_lost": ["self", "exc"],
}
"""Methods of uvicorn's HTTP protocol that ours overrides, with their parameters."""

OVERRIDDEN_BY_WEBSOCKETS = {
    "data_received": ["self", "data"],
    "send_receive_event_to_app": ["self"],
    "send": ["self", "message"],
    "connection_lost": ["self", "exc"],
}
"""The same for uvicorn's WebSocket protocol."""

GET = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"
UPGRADE = (
    b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
    b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
POST_HEAD = b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n\r\n"


class Transport(asyncio.Transport):
    """Records the calls of a protocol."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False
        self.reading = True
        self.protocol: Any = None

    def write(self, data: Any) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def get_protocol(self) -> Any:
        return self.protocol

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


async def waiting_app(scope: Any, receive: Any, send: Any) -> None:
    """Never responds."""
    await asyncio.Event().wait()


def configuration(**options: Any) -> uvicorn.Config:
    """Returns a configuration like that of the web port."""
    return uvicorn.Config(waiting_app, ws="websockets-sansio", loop="none", lifespan="off", log_config=None, **options)


def connected(protocol_class: type[HttpToolsProtocol]) -> Any:
    """Returns a protocol with an open connection."""
    protocol = protocol_class(config=configuration(), server_state=ServerState(), app_state={})
    transport = Transport()
    transport.set_protocol(protocol)
    protocol.connection_made(transport)
    return protocol


@pytest.fixture
async def protocol() -> Any:
    """An HTTP protocol of uvicorn itself, with an open connection."""
    protocol = connected(HttpToolsProtocol)
    yield protocol
    tasks = list(protocol.tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_overridden_method_exists(name: str) -> None:
    """The HTTP protocol of uvicorn has the method, with the same parameters."""
    method = getattr(HttpToolsProtocol, name, None)
    assert method is not None, f"uvicorn's HttpToolsProtocol no longer has {name}"
    assert list(inspect.signature(method).parameters) == OVERRIDDEN[name]


def test_every_override_has_a_test() -> None:
    """The methods that our protocol overrides are exactly those in `OVERRIDDEN`."""
    own = vars(HttpProtocol)
    assert {name for name in own if hasattr(HttpToolsProtocol, name) and not name.startswith("__")} == set(OVERRIDDEN)


@pytest.mark.parametrize("name", OVERRIDDEN_BY_WEBSOCKETS)
def test_overridden_websocket_method_exists(name: str) -> None:
    """The WebSocket protocol of uvicorn has the method, with the same parameters, and ours overrides no other."""
    theirs = websockets_sansio_impl.WebSocketsSansIOProtocol
    assert list(inspect.signature(getattr(theirs, name)).parameters) == OVERRIDDEN_BY_WEBSOCKETS[name]
    overridden = {each for each in vars(WebSocketProtocol) if hasattr(theirs, each) and not each.startswith("__")}
    assert overridden == set(OVERRIDDEN_BY_WEBSOCKETS)


@pytest.mark.parametrize(
    "name",
    [
        *("conn", "loop", "transport", "handshake_initiated", "handshake_complete"),
        *("curr_msg_data_type", "frames", "close_sent", "handle_parser_exception"),
    ],
)
async def test_websocket_attribute_exists(name: str) -> None:
    """A WebSocket protocol has the attributes that ours reads."""
    protocol = WebSocketProtocol(config=configuration(), server_state=ServerState(), app_state={})
    assert hasattr(protocol, name), f"uvicorn's WebSocketsSansIOProtocol no longer has {name}"


async def test_a_handshake_that_cannot_be_parsed_is_not_closed_by_uvicorn(protocol: Any) -> None:
    """The fault that our WebSocket protocol corrects is still there: only `conn.handshake_exc` shows the failure."""
    headers = b"".join(b"x-%d: y\r\n" % number for number in range(130))
    protocol.data_received(b"GET / HTTP/1.1\r\nhost: localhost\r\n" + UPGRADE + headers + b"\r\n")
    websocket = protocol.transport.get_protocol()
    assert not protocol.transport.closed
    assert websocket.conn.handshake_exc is not None
    assert not websocket.handshake_initiated


async def test_trailers_become_headers(protocol: Any) -> None:
    """The fault that our `on_header` corrects is still there: a trailer is appended to the headers of its request."""
    head = b"POST / HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    protocol.data_received(head + b"0\r\nauthorization: Bearer late\r\n\r\n")
    assert (b"authorization", b"Bearer late") in protocol.cycle.scope["headers"]


@pytest.mark.parametrize("name", ["connections", "transport", "loop", "flow", "pipeline", "cycle", "send_400_response"])
async def test_protocol_attribute_exists(protocol: Any, name: str) -> None:
    """A connected protocol has the attributes that ours reads."""
    assert hasattr(protocol, name), f"uvicorn's HttpToolsProtocol no longer has {name}"


@pytest.mark.parametrize("name", ["url", "headers"])
async def test_request_attribute_exists(protocol: Any, name: str) -> None:
    """After a request has started, the protocol has the attributes whose size ours limits."""
    protocol.data_received(GET)
    assert hasattr(protocol, name), f"uvicorn's HttpToolsProtocol no longer has {name}"


@pytest.mark.parametrize("name", ["response_complete", "disconnected", "message_event"])
async def test_cycle_attribute_exists(protocol: Any, name: str) -> None:
    """The object for one request and its response has the attributes that ours reads or sets."""
    protocol.data_received(GET)
    assert hasattr(protocol.cycle, name), f"uvicorn's RequestResponseCycle no longer has {name}"


async def test_head_contains_url_and_headers(protocol: Any) -> None:
    """`url` and `headers` hold the bytes of the request head."""
    protocol.data_received(GET)
    assert protocol.url == b"/"
    assert protocol.headers == [(b"host", b"localhost")]


async def test_cycle_is_none_before_the_first_request(protocol: Any) -> None:
    """`cycle` is None at first, then the newest request, whose response is not complete."""
    first = protocol.cycle
    assert first is None
    protocol.data_received(GET)
    assert protocol.cycle.response_complete is False


async def test_pipelined_requests_wait_and_pause_reading(protocol: Any) -> None:
    """The second request goes to `pipeline`; `flow.resume_reading` undoes the pause, as ours does."""
    protocol.data_received(GET + GET)
    assert len(protocol.pipeline) == 1
    assert not protocol.transport.reading
    protocol.flow.resume_reading()
    assert protocol.transport.reading


async def test_a_disconnect_reaches_only_the_newest_request(protocol: Any) -> None:
    """The fault that our `connection_lost` corrects is still there: the active request is not disconnected."""
    started = []
    start = protocol._start_asgi_task
    protocol._start_asgi_task = lambda cycle, app: (started.append(cycle), start(cycle, app))
    protocol.data_received(GET + GET)
    protocol.connection_lost(None)
    assert protocol.cycle.disconnected
    assert [cycle.disconnected for cycle in started] == [False]


async def test_setting_disconnected_ends_receive(protocol: Any) -> None:
    """A request whose `disconnected` and `message_event` are set receives http.disconnect."""
    protocol.data_received(POST_HEAD)
    protocol.cycle.disconnected = True
    protocol.cycle.message_event.set()
    assert await protocol.cycle.receive() == {"type": "http.disconnect"}


async def test_a_parser_error_in_a_callback_gets_400() -> None:
    """HttpParserError raised by `on_headers_complete` is answered with 400 and closes the connection."""

    class Rejecting(HttpToolsProtocol):
        def on_headers_complete(self) -> None:
            raise HttpParserError("too large")

    protocol = connected(Rejecting)
    protocol.data_received(GET)
    assert protocol.transport.written.startswith(b"HTTP/1.1 400 ")
    assert protocol.transport.closed


async def test_send_400_response_closes_the_connection(protocol: Any) -> None:
    """`send_400_response` writes the given text as a 400 and closes the connection."""
    protocol.send_400_response("The text.")
    assert protocol.transport.written.startswith(b"HTTP/1.1 400 ")
    assert protocol.transport.written.endswith(b"The text.")
    assert protocol.transport.closed


async def test_connections_are_those_of_the_server_state(protocol: Any) -> None:
    """`connections` and `server_state.connections` are the same set, and contain the open connection."""
    assert protocol.connections is protocol.server_state.connections
    assert protocol.connections == {protocol}


async def test_a_websocket_replaces_the_protocol_of_the_transport(protocol: Any) -> None:
    """After an upgrade, `transport.get_protocol()` is no longer the HTTP protocol."""
    protocol.data_received(b"GET / HTTP/1.1\r\nhost: localhost\r\n" + UPGRADE + b"\r\n")
    assert isinstance(protocol.transport.get_protocol(), websockets_sansio_impl.WebSocketsSansIOProtocol)


def test_http_may_be_a_callable_with_known_arguments() -> None:
    """`Config(http=...)` accepts a callable, and the server calls it with the arguments of `HttpToolsProtocol`."""
    config = configuration(http=HttpProtocol)
    config.load()
    assert config.http_protocol_class is HttpProtocol
    parameters = list(inspect.signature(HttpToolsProtocol.__init__).parameters)
    assert parameters == ["self", "config", "server_state", "app_state", "_loop"]


async def test_the_server_creates_protocols_by_keyword() -> None:
    """`TlsHandshakes` receives `server_state` by keyword, and passes all keywords on."""
    received: list[dict[str, Any]] = []
    connected = asyncio.Event()

    def create(**arguments: Any) -> asyncio.Protocol:
        received.append(arguments)
        connected.set()
        return asyncio.Protocol()

    server = uvicorn_server._Server(configuration(http=create))
    [listening] = listen("127.0.0.1:0")
    port = listening.getsockname()[1]
    serving = asyncio.create_task(server.serve([listening]))
    await asyncio.wait_for(server.ready.wait(), 20)
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    await asyncio.wait_for(connected.wait(), 20)
    writer.close()
    server.should_exit = True
    await asyncio.wait_for(serving, 20)
    assert set(received[0]) == {"config", "server_state", "app_state", "_loop"}
    assert received[0]["server_state"].connections == set()


@pytest.mark.parametrize(("name", "parameters"), [("startup", ["self", "sockets"]), ("capture_signals", ["self"])])
def test_overridden_server_method_exists(name: str, parameters: list[str]) -> None:
    """`uvicorn.Server` has the method, with the same parameters."""
    method = getattr(uvicorn.Server, name, None)
    assert method is not None, f"uvicorn.Server no longer has {name}"
    assert list(inspect.signature(method).parameters) == parameters


def test_should_exit_exists() -> None:
    """`uvicorn.Server` has the flag that makes `serve` return."""
    assert uvicorn.Server(configuration()).should_exit is False


def test_client_disconnected_exists() -> None:
    """A WebSocket app may raise ClientDisconnected after its response, and uvicorn's protocol catches it."""
    assert issubclass(ClientDisconnected, OSError)
    assert "except ClientDisconnected" in inspect.getsource(websockets_sansio_impl.WebSocketsSansIOProtocol.run_asgi)


def test_ws_may_be_a_class() -> None:
    """`Config(ws=...)` accepts a protocol class."""
    config = uvicorn.Config(waiting_app, ws=WebSocketProtocol, loop="none", lifespan="off", log_config=None)
    config.load()
    assert config.ws_protocol_class is WebSocketProtocol


def test_without_proxy_headers_the_application_is_not_wrapped() -> None:
    """`Config(proxy_headers=False)` turns off uvicorn's trust in proxies on this machine, which is on by default."""
    for trusting in (False, True):
        config = configuration(proxy_headers=trusting)
        config.load()
        assert (config.loaded_app is waiting_app) is not trusting
