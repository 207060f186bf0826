"""`/metrics` of a real server: counters of each port, and access to them."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import grpc
import promql_parser
import pytest

from calotype.v1 import calotype_pb2 as pb
from calotype_server.auth.access import Access, Caller
from calotype_server.errors import AddressInUse, GenerationFailed
from calotype_server.observability.metrics import ServerMetrics
from calotype_server.transport.web.metrics_endpoint import MetricsServer
from calotype_server.transport.web.server import WebServer
from support.engine.fake_engine import FakeEngine
from support.grpcweb import Connection, header_dict
from support.keyring import Keyring
from support.metrics import Scrape
from support.service import GRPC_TRANSPORTS, read_until, running

DASHBOARD = Path(__file__).parents[2] / "service" / "grafana.json"
PORTS = {
    "native": "native",
    "grpc-web": "grpc-web",
    "grpc-web-text": "grpc-web",
    "bridge": "bridge",
    "sse": "http",
    "websocket": "websocket",
}
"""The label of each transport in the metrics."""
CALLS = {"sse": ("generate", "200"), "websocket": ("connect", "101")}
"""Method and code of a successful call over HTTP."""
PROMPT = pb.GenerateRequest(prompt="unmistakable")


@pytest.fixture
def metrics() -> ServerMetrics:
    """The metrics of one server."""
    return ServerMetrics("1")


async def get(address: str, path: str = "/metrics", **headers: str) -> tuple[int, dict[str, str], str]:
    """Sends a GET request and returns status, headers and body."""
    connection = await Connection.open(address)
    try:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        await connection.request("GET", path, {"host": address, **given})
        head, body = await connection.answer("GET")
    finally:
        connection.close()
    return head.status_code, header_dict(head), body.decode()


def web_server(address: str, metrics: ServerMetrics, access: Access | None = None) -> WebServer:
    """Returns a web server without a gRPC service."""
    return WebServer(
        address,
        lambda _: None,
        access or Access(),
        is_ready=lambda: asyncio.sleep(0, True),
        allowed_hosts=["images.example"],
        metrics=metrics.render,
    )


async def test_a_generation_updates_the_metrics(transport: str, metrics: ServerMetrics) -> None:
    """Messages are counted for their transport; phases, preview method and end are counted once."""
    port = PORTS[transport]
    async with running(FakeEngine(), transport=transport, observe=metrics.observe) as service:
        messages = [message async for message in service.stub.Generate(PROMPT)]
    scrape = Scrape.of(metrics)
    count = scrape.value("calotype_messages_sent_total", transport=port)
    size = scrape.value("calotype_sent_bytes_total", transport=port)
    if transport in GRPC_TRANSPORTS:
        assert (count, size) == (len(messages), sum(message.ByteSize() for message in messages))
    else:
        # Messages are JSON, and a WebSocket sends images separately.
        assert count >= len(messages)
        assert size > sum(len(message.image) for message in messages)
    method, code = CALLS.get(transport, ("Generate", "OK"))
    assert scrape.value("calotype_calls_total", transport=port, method=method, code=code) == 1
    for once in ("queue_wait_seconds", "first_preview_seconds"):
        assert scrape.value(f"calotype_{once}_count") == 1
    assert {labels["phase"] for labels in scrape.labels("calotype_phase_seconds_count")} == {
        "queue",
        "encode_prompt",
        "denoise",
        "decode",
        "encode_image",
    }
    assert scrape.labels("calotype_previews_total") == [{"method": "head", "chosen_by": "auto"}]
    assert scrape.value("calotype_generations_ended_total", outcome="succeeded") == 1
    assert "unmistakable" not in metrics.render("")[0].decode()


async def test_rejected_calls_and_failed_generations_are_counted_separately(
    transport: str, metrics: ServerMetrics
) -> None:
    """An invalid request counts as rejected, with its reason; a failed generation counts as an error of its phase."""
    engine, port = FakeEngine(), PORTS[transport]
    engine.failure = GenerationFailed("no")
    async with running(engine, transport=transport, observe=metrics.observe) as service:
        for request in (pb.GenerateRequest(prompt=""), PROMPT):
            with pytest.raises(grpc.aio.AioRpcError):
                _ = [message async for message in service.stub.Generate(request)]
    scrape = Scrape.of(metrics)
    codes = {"sse": ["400", "200"], "websocket": ["101", "101"]}.get(transport, ["INVALID_ARGUMENT", "INTERNAL"])
    for code in codes:
        assert scrape.value("calotype_calls_total", transport=port, code=code) == codes.count(code)
    assert scrape.value("calotype_refused_total", reason="INVALID_REQUEST") == 1
    assert scrape.value("calotype_errors_total", phase="denoise") == 1
    assert scrape.value("calotype_generations_ended_total", outcome="failed", reason="GENERATION_FAILED") == 1


async def test_a_cancel_is_timed_until_the_slot_is_free(transport: str, metrics: ServerMetrics) -> None:
    """Cancelling a running generation is timed; cancelling a queued one is not, because it has no slot."""
    engine = FakeEngine()
    engine.hold()
    async with running(engine, transport=transport, observe=metrics.observe) as service:
        metrics.bind_gauges(active=lambda: service.admission.active, queued=lambda: service.admission.waiting)
        calls, ids = [], []
        for _ in range(2):
            calls.append(service.stub.Generate(PROMPT))
            ids.append((await calls[-1].read()).generation_id)
        busy = Scrape.of(metrics)
        assert busy.value("calotype_active_generations") == busy.value("calotype_queued_generations") == 1
        for generation_id in reversed(ids):
            await service.stub.Cancel(pb.CancelRequest(generation_id=generation_id))
        await read_until(calls[1], pb.PHASE_CANCELLED)
        assert Scrape.of(metrics).value("calotype_cancel_seconds_count") == 0
        engine.allow()
        await read_until(calls[0], pb.PHASE_CANCELLED)
        await service.generations.idle()
        idle = Scrape.of(metrics)
    assert idle.value("calotype_cancel_seconds_count") == 1
    assert idle.value("calotype_active_generations") == idle.value("calotype_queued_generations") == 0
    assert idle.value("calotype_generations_ended_total", outcome="cancelled", reason="CANCELLED") == 2


async def test_a_disconnected_call_counts_as_cancelled(grpc_transport: str, metrics: ServerMetrics) -> None:
    """This holds for every gRPC transport."""
    engine, counted = FakeEngine(), asyncio.Event()
    engine.hold()

    def observe(observation) -> None:
        metrics.observe(observation)
        if Scrape.of(metrics).value("calotype_calls_total", transport=PORTS[grpc_transport], code="CANCELLED"):
            counted.set()

    async with running(engine, transport=grpc_transport, observe=observe) as service:
        call = service.stub.Generate(PROMPT)
        await call.read()
        call.cancel()
        await asyncio.wait_for(counted.wait(), 20)
        engine.allow()


async def test_unread_previews_are_counted(metrics: ServerMetrics) -> None:
    """The metric counts as many unread previews as the messages report to slow readers."""
    engine = FakeEngine()
    engine.hold()
    async with running(engine, observe=metrics.observe) as service:
        job_call = service.stub.Generate(PROMPT)
        generation_id = (await job_call.read()).generation_id
        generation = service.generations.find(generation_id, Caller(""))
        async with service.generations.follow(generation) as reader:
            await anext(reader)
            engine.allow()
            by_call = (await read_until(job_call, pb.PHASE_SUCCEEDED)).previews_dropped
            async for update, _ in reader:
                by_reader = update.previews_dropped
    assert by_reader > 0
    assert Scrape.of(metrics).value("calotype_previews_dropped_total", where="unread") == by_call + by_reader


async def test_unknown_methods_share_one_series(metrics: ServerMetrics) -> None:
    """A bridge forwards any method, and counts all unknown ones as "other"."""
    async with running(FakeEngine(), transport="bridge", observe=metrics.observe) as service:
        for name in range(20):
            with pytest.raises(grpc.aio.AioRpcError):
                await service.channel.unary_stream(f"/evil.v1.Service{name}/Method{name}")(b"").read()
    labels = [each for each in Scrape.of(metrics).labels("calotype_calls_total") if each["transport"] == "bridge"]
    assert labels == [{"transport": "bridge", "method": "other", "code": "UNIMPLEMENTED"}]


async def test_unknown_paths_share_one_series(metrics: ServerMetrics) -> None:
    """HTTP calls are counted by route, not by path, so ids and unknown paths create no series."""
    async with running(FakeEngine(), transport="sse", observe=metrics.observe) as service:
        for number in range(10):
            for path in (f"/v1/evil{number}", f"/v1/generations/evil{number}"):
                assert (await get(service.address, path))[0] == 404
    labels = Scrape.of(metrics).labels("calotype_calls_total")
    assert {each["method"] for each in labels} == {"other", "state"}
    assert len(labels) == 2


async def test_metrics_are_readable_on_loopback(metrics: ServerMetrics) -> None:
    """The format is text or OpenMetrics, as the Accept header asks, and responses are not cached."""
    async with running(FakeEngine(), transport="grpc-web", metrics=metrics.render) as service:
        status, headers, body = await get(service.address)
        assert (status, headers["cache-control"]) == (200, "no-store")
        assert headers["content-type"].startswith("text/plain; version=")
        assert Scrape(body).labels("calotype_build_info") == [{"version": "1"}]
        _, headers, body = await get(service.address, accept="application/openmetrics-text; version=1.0.0")
        assert headers["content-type"].startswith("application/openmetrics-text")
        assert body.endswith("# EOF\n")


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "images.example"},
        {"x_forwarded_for": "203.0.113.5"},
        {"x_real_ip": "203.0.113.5"},
        {"forwarded": "for=203.0.113.5"},
        {"via": "1.1 proxy"},
        {"origin": "https://evil.example"},
    ],
)
async def test_proxied_and_cross_origin_requests_are_rejected(metrics: ServerMetrics, headers) -> None:
    """Neither a proxy nor a web page on this machine gives others access to the metrics."""
    server = web_server("127.0.0.1:0", metrics)
    address = await server.start()
    try:
        status, _, body = await get(address, **headers)
    finally:
        await server.stop(0)
    assert status == 403
    assert "calotype_" not in body


async def test_a_public_web_port_serves_no_metrics(metrics: ServerMetrics) -> None:
    """A web port on all addresses rejects every client; the separate metrics port accepts every client."""
    web, own = web_server("0.0.0.0:0", metrics), MetricsServer("0.0.0.0:0", metrics.render)
    addresses = [(await server.start()).replace("0.0.0.0", "127.0.0.1") for server in (web, own)]
    try:
        status, _, body = await get(addresses[0])
        assert (status, "calotype_" in body) == (403, False)
        status, _, body = await get(addresses[1], host="calotype.monitoring.svc")
        assert (status, "calotype_build_info" in body) == (200, True)
        with pytest.raises(AddressInUse, match="--metrics-address"):
            await MetricsServer(addresses[1], metrics.render).start()
    finally:
        await web.stop(0)
        await own.stop()


async def test_with_keys_only_operators_read_metrics(metrics: ServerMetrics, tmp_path: Path) -> None:
    """Operators read metrics from any host; users and callers without a key do not, even on this machine."""
    keyring = Keyring(tmp_path / "keys.toml")
    keyring.add("alice")
    keyring.add("root", role="operator")
    web = web_server("0.0.0.0:0", metrics, keyring.access())
    address = (await web.start()).replace("0.0.0.0", "127.0.0.1")
    try:
        seen = {}
        for name in ("root", "alice"):
            key = dict(keyring.metadata(name))["authorization"]
            seen[name] = await get(address, authorization=key, host="images.example", x_forwarded_for="203.0.113.5")
        no_key = await get(address)
        wrong = await get(address, authorization="Bearer calotype_nobody_x")
    finally:
        await web.stop(0)
    assert {name: status for name, (status, _, _) in seen.items()} == {"root": 200, "alice": 403}
    assert "calotype_build_info" in seen["root"][2]
    for status, headers, body in (no_key, wrong):
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert "calotype_build_info" not in body


async def test_the_metrics_port_on_loopback_is_closed_to_pages(metrics: ServerMetrics) -> None:
    """The port is safe from DNS rebinding: it rejects other host names."""
    own = MetricsServer("127.0.0.1:0", metrics.render)
    address = await own.start()
    try:
        assert (await get(address))[0] == 200
        assert (await get(address, host="evil.example"))[0] == 421
    finally:
        await own.stop()


def expressions() -> list[tuple[str, str]]:
    """Returns the title and expression of every query of the dashboard."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [(panel["title"], target["expr"]) for panel in panels for target in panel.get("targets", ())]


async def test_the_dashboard_uses_only_existing_metrics(metrics: ServerMetrics) -> None:
    """A real server exposes every metric and label in every expression of the dashboard."""
    async with running(FakeEngine(), transport="grpc-web", observe=metrics.observe, metrics=metrics.render) as service:
        _ = [message async for message in service.stub.Generate(PROMPT)]
        _, _, body = await get(service.address)
    known = {}
    for family in Scrape(body).families:
        described = next((each for each in metrics.catalogue if each.name.startswith(family.name)), None)
        suffixes = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",)}.get(family.type, ("",))
        for suffix in suffixes:
            own = set() if described is None else set(described.labels)
            known[family.name + suffix] = own | ({"le"} if suffix == "_bucket" else set())
    asked = set()
    for title, expression in expressions():
        names = re.findall(r"\b(?:calotype|process)_\w+", expression)
        assert names, title
        assert set(names) <= known.keys(), title
        labels = {"instance", "job"}.union(*(known[name] for name in names))
        used = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expression)
        for group in re.findall(r"\bby \(([^)]*)\)", expression):
            used += [label.strip() for label in group.split(",")]
        assert set(used) <= labels, title
        promql_parser.parse(expression.replace("$__rate_interval", "1m"))
        asked |= set(names)
    for alert in ("queue_wait_seconds_bucket", "first_preview_seconds_bucket", "previews_dropped_total"):
        assert f"calotype_{alert}" in asked
    assert {"calotype_generations_ended_total", "process_resident_memory_bytes"} <= asked
