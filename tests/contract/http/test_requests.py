"""Requirements on HTTP requests: format, size, time and origin, and the responses to rejected ones."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from calotype_server.api.service import GenerationService
from calotype_server.limits import PortLimits
from calotype_server.types import Lora
from support.engine.fake_engine import FakeEngine
from support.grpcweb import Connection
from support.service import running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx

    from support.service import Service

APPLE = {"prompt": "a red apple"}
APP = "https://app.example"


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    """A server that allows pages of one other site."""
    ports = PortLimits(request_seconds=0.2)
    async with running(FakeEngine(), transport="sse", ports=ports, web={"allowed_origins": [APP]}) as service:
        yield service


@pytest.fixture
def client(service: Service) -> httpx.AsyncClient:
    """An HTTP client of the server."""
    return service.stub.client


def fields(response: httpx.Response) -> list[str]:
    """Returns the fields of the violations in a response."""
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == error["violations"][0]["field"]
    return [each["field"] for each in error["violations"]]


@pytest.mark.proves("sse", "errors")
async def test_parsing_and_validation_errors_are_reported_together(client: httpx.AsyncClient) -> None:
    """A field of the wrong type does not hide a field that is out of range, and is reported once."""
    body = {
        "prompt": 5,
        "width_px": 63,
        "step_count": "many",
        "seed": "-2",
        "preview": {"quality": 1000, "every_steps": [], "odd": 1},
        "on_disconnect": "KEEP",
        "disconnect_grace": "ten seconds",
        "odd": None,
        "strange": 1,
    }
    reported = fields(await client.post("/generate", json=body))
    unparsable = [
        "prompt",
        "step_count",
        "preview.every_steps",
        "preview.odd",
        "on_disconnect",
        "disconnect_grace",
        "strange",
    ]
    assert reported == [*unparsable, "width_px", "seed", "preview.quality"]
    query = {"width_px": "63", "seed": "x", "preview.quality": "1000", "preview.odd": "1", "odd": "1"}
    assert fields(await client.get("/generate", params=query)) == [
        *("seed", "preview.odd", "odd", "prompt", "width_px", "preview.quality")
    ]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"{", "application/json"),
        (b"[1]", "application/json"),
        (b"", "application/json"),
        (b"[" * 5000, "application/json"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "application/json"),
        (b'{"prompt": "\\ud800"}', "application/json"),
        (b'{"\\ud800": 1}', "application/json"),
        (b"\xff\xfe", "application/json"),
    ],
)
@pytest.mark.parametrize("path", ["/generate", "/images/generations"])
async def test_a_malformed_body_is_rejected(client: httpx.AsyncClient, path: str, content: bytes, kind: str) -> None:
    """The response is 400 in the common error format."""
    response = await client.post(path, content=content, headers={"content-type": kind})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_json_follows_the_proto3_mapping(client: httpx.AsyncClient) -> None:
    """64-bit integers may be strings or numbers, null means absent, and durations are in seconds."""
    for seed in (7, "7"):
        body = {
            **APPLE,
            "seed": seed,
            "negative_prompt": None,
            "disconnect_grace": "1.5s",
            "output": {"metadata": False},
        }
        text = (await client.post("/generate", json=body)).text
        assert '"seed":"7"' in text


async def test_size_and_arrival_time_are_limited(service: Service, client: httpx.AsyncClient) -> None:
    """Too many bytes, announced or not, get 413; a body that does not arrive gets 408."""

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 1024

    large = await client.post("/generate", json={"prompt": "x" * 70_000})
    unannounced = await client.post("/generate", content=pieces(), headers={"content-type": "application/json"})
    for response in (large, unannounced):
        assert (response.status_code, response.json()["error"]["code"]) == (413, "REQUEST_TOO_LARGE")
    connection = await Connection.open(service.address)
    await connection.request("POST", "/v1/generate", {"host": service.address, "content-length": "10"})
    head, body = await connection.answer()
    connection.close()
    assert (head.status_code, json.loads(body)["error"]["code"]) == (408, "REQUEST_TOO_LATE")


async def test_only_allowed_pages_start_generations(client: httpx.AsyncClient) -> None:
    """A foreign page gets 403, also for an `<img>`, which sends no origin; an allowed page can read the response."""
    assert (await client.post("/generate", json=APPLE, headers={"origin": "https://evil.example"})).status_code == 403
    for site in ("cross-site", "same-site"):
        image = await client.get("/generate", params=APPLE, headers={"sec-fetch-site": site})
        assert (image.status_code, image.json()["error"]["type"]) == (403, "permission_error")
    allowed = await client.get("/generate", params=APPLE, headers={"sec-fetch-site": "cross-site", "origin": APP})
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == APP
    preflight = {
        "origin": APP,
        "access-control-request-method": "GET",
        "access-control-request-headers": "last-event-id",
    }
    assert (await client.options("/generate", headers=preflight)).status_code == 200
    for site in ("none", "same-origin"):
        assert (await client.get("/generate", params=APPLE, headers={"sec-fetch-site": site})).status_code == 200


async def test_unknown_paths_and_methods_get_the_common_error_format(client: httpx.AsyncClient) -> None:
    """404 and 405 have the common error format and repeat the request id, unless it is unfit for a header."""
    for method, path, status in (("GET", "/nothing", 404), ("DELETE", "/generate", 405), ("POST", "/models", 405)):
        response = await client.request(method, path, headers={"x-request-id": "mine"})
        assert (response.status_code, response.json()["error"]["type"]) == (status, "invalid_request_error")
        assert response.headers["x-request-id"] == "mine"
    odd = await client.get("/model", headers=[(b"x-request-id", b"\xe4\xf6")])
    assert odd.headers["x-request-id"].isascii()


async def test_requests_during_loading_get_a_retry_delay() -> None:
    """Every operation answers 503 with retry-after while the model loads."""
    async with running(FakeEngine(), transport="sse", opened=False) as service:
        for method, path, options in (
            ("POST", "/generate", {"json": APPLE}),
            ("POST", "/images/generations", {"json": APPLE}),
            ("GET", "/models", {}),
            ("GET", "/generations", {}),
        ):
            response = await service.stub.client.request(method, path, **options)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "NOT_READY")
            assert response.headers["retry-after"] == "2"


async def test_an_unexpected_exception_is_hidden(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The response is 500 without the text of the exception, and the next request succeeds."""

    def broken(*_: object) -> None:
        raise ValueError("secret")

    with monkeypatch.context() as patched:
        patched.setattr(GenerationService, "model", broken)
        response = await client.get("/model")
        assert response.status_code == 500
        assert "secret" not in response.text
        assert response.json()["error"]["type"] == "server_error"
    assert (await client.get("/model")).status_code == 200


async def test_a_failed_generation_has_the_status_of_its_error(client: httpx.AsyncClient, service: Service) -> None:
    """Without a stream, the HTTP status shows why: here, another client cancelled the generation."""
    engine = service.engine
    engine.hold()
    asking = asyncio.create_task(client.post("/images/generations", json=APPLE))
    assert await asyncio.to_thread(engine.at_step.acquire, timeout=20)
    [listed] = (await client.get("/generations")).json()["generations"]
    await client.post(f"/generations/{listed['generation_id']}/cancel")
    engine.allow()
    response = await asking
    assert (response.status_code, response.json()["error"]["code"]) == (499, "CANCELLED")
    answer: dict[str, Any] = (await client.post(f"/generations/{listed['generation_id']}/cancel")).json()
    assert answer == {"phase": "PHASE_CANCELLED"}


async def test_lists_of_objects() -> None:
    """LoRAs are a list in JSON, and numbered fields in a query; violations name the entry in the same way."""
    engine = FakeEngine()
    engine.model = replace(engine.model, loras=("style", "subject"))
    async with running(engine, transport="sse") as service:
        client = service.stub.client
        body = {**APPLE, "loras": [{"name": "style", "scale": 0.5}, {"name": "subject"}]}
        assert (await client.post("/generate", json=body)).status_code == 200
        query = "prompt=a&loras.0.name=style&loras.0.scale=0.5&loras.1.name=subject"
        assert (await client.get(f"/generate?{query}")).status_code == 200
        assert [job.loras for job in engine.jobs] == [(Lora("style", 0.5), Lora("subject", 1.0))] * 2
        wrong = {**APPLE, "seed": "x", "loras": [{"name": "style", "scale": "x"}, {"name": "subject", "odd": 1}]}
        assert fields(await client.post("/generate", json=wrong)) == ["seed", "loras.0.scale", "loras.1.odd"]
        mixed = {**APPLE, "loras": [7, {"name": "style", "scale": "x"}]}
        assert fields(await client.post("/generate", json=mixed)) == ["loras.0", "loras.1.scale"]
        many = {**APPLE, "loras": [{"odd": 1}] * 1000}
        assert fields(await client.post("/generate", json=many)) == ["loras"]
        unknown = {**APPLE, "loras": [{"name": "nobody"}]}
        assert fields(await client.post("/generate", json=unknown)) == ["loras.0.name"]
        assert fields(await client.get("/generate?prompt=a&loras.0.scale=x")) == ["loras.0.scale", "loras.0.name"]
        assert fields(await client.get("/generate?prompt=a&loras.x=1")) == ["loras"]
