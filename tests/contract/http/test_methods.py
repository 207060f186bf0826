"""Methods, content types and codings of every path, as RFC 9110 describes them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from calotype.v1 import calotype_pb2 as pb
from support.engine.fake_engine import FakeEngine
from support.service import read_until, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from support.service import Service

APP = "https://app.example"
GET, POST = "GET, HEAD", "POST"
ROUTES = {
    "/healthz": GET,
    "/readyz": GET,
    "/metrics": GET,
    "/": GET,
    "/assets/app.js": GET,
    "/docs": GET,
    "/docs.css": GET,
    "/openapi.json": GET,
    "/v1/models": GET,
    "/v1/models/fake": GET,
    "/v1/model": GET,
    "/v1/images/generations": POST,
    "/v1/images/ID/TOKEN": GET,
    "/v1/generate": "GET, HEAD, POST",
    "/v1/generations": GET,
    "/v1/generations/ID": GET,
    "/v1/generations/ID/events": GET,
    "/v1/generations/ID/image": GET,
    "/v1/generations/ID/preview/0": GET,
    "/v1/generations/ID/cancel": POST,
    "/v1/generations/ID/finish": POST,
    "/v1/cancel": POST,
    "/calotype.v1.GenerationService/GetModel": POST,
    "/grpc.health.v1.Health/Check": POST,
}
EVERY_ROUTE = pytest.mark.parametrize("route", ROUTES)


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    """A server with a page, metrics, and one other origin."""
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "app.js").write_text("go()")
    (tmp_path / "index.html").write_text("<h1>Calotype</h1>")
    web = {"page": tmp_path, "allowed_origins": [APP]}
    async with running(FakeEngine(), transport="sse", web=web, metrics=lambda _: (b"1", "text/plain")) as service:
        yield service


async def url_of(service: Service, route: str) -> str:
    """Returns the URL of a route; with ID, that of a generation that has ended."""
    base = f"http://{service.address}"
    if "TOKEN" in route:
        answer = await service.stub.client.post("/images/generations", json={"prompt": "a", "response_format": "url"})
        return answer.json()["data"][0]["url"]
    if "ID" in route:
        ended = await read_until(service.stub.Generate(pb.GenerateRequest(prompt="a")), pb.PHASE_SUCCEEDED)
        return base + route.replace("ID", ended.generation_id)
    return base + route


def normalized(header: str) -> str:
    """Returns a list in a header in alphabetical order."""
    return ", ".join(sorted(each.strip() for each in header.split(",")))


@EVERY_ROUTE
async def test_other_methods_are_rejected_with_those_allowed(service: Service, route: str) -> None:
    """405 lists all methods of the path, and so does a preflight request."""
    url = await url_of(service, route)
    client = service.stub.client
    for method in {"GET", "POST", "PUT", "DELETE", "PATCH"} - set(ROUTES[route].split(", ")):
        answer = await client.request(method, url)
        assert (answer.status_code, normalized(answer.headers["allow"])) == (405, ROUTES[route]), method
    preflight = {"origin": APP, "access-control-request-method": "POST"}
    answer = await client.options(url, headers=preflight)
    assert normalized(answer.headers["access-control-allow-methods"]) == ROUTES[route]


@pytest.mark.parametrize("route", [route for route, methods in ROUTES.items() if "GET" in methods])
async def test_head_returns_the_headers_of_get_and_has_no_effect(service: Service, route: str) -> None:
    """The response has no body. HEAD for a stream neither starts nor follows a generation."""
    url = await url_of(service, route)
    started = len(service.engine.jobs)
    head = await service.stub.client.head(url, params={"prompt": "a"} if route == "/v1/generate" else {})
    assert (head.status_code, head.content) == (200, b"")
    assert len(service.engine.jobs) == started
    get = await service.stub.client.get(url, params={"prompt": "a"} if route == "/v1/generate" else {})
    assert get.status_code == 200
    for name in ("content-type", "content-length", "cache-control", "etag", "content-security-policy"):
        assert head.headers.get(name) == get.headers.get(name), name


async def test_head_for_an_unknown_generation_is_not_found(service: Service) -> None:
    """HEAD has the status of GET, also for a stream."""
    for path in ("", "/events", "/image"):
        assert (await service.stub.client.head(f"/generations/unknown{path}")).status_code == 404


@pytest.mark.parametrize("coding", ["gzip", "br, identity", "unknown"])
@pytest.mark.parametrize("route", [route for route, methods in ROUTES.items() if "POST" in methods])
async def test_a_compressed_body_is_rejected(service: Service, route: str, coding: str) -> None:
    """415 says which codings are accepted, also for a compressed body that would be valid."""
    url = await url_of(service, route)
    kind = "application/grpc-web+proto" if "." in route else "application/json"
    headers = {"content-type": kind, "content-encoding": coding}
    answer = await service.stub.client.post(url, content=b"{}", headers=headers)
    assert (answer.status_code, answer.headers["accept-encoding"]) == (415, "identity")
    accepted = await service.stub.client.post(url, content=b"{}", headers={**headers, "content-encoding": "Identity"})
    assert accepted.status_code != 415


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
@pytest.mark.parametrize("route", ["/v1/generate", "/v1/images/generations"])
async def test_a_body_of_another_type_is_rejected(service: Service, route: str, kind: str | None) -> None:
    """415 says which type is accepted, and no generation starts."""
    headers = {} if kind is None else {"content-type": kind}
    url = await url_of(service, route)
    answer = await service.stub.client.post(url, content=json.dumps({"prompt": "a"}), headers=headers)
    assert (answer.status_code, answer.headers["accept-post"]) == (415, "application/json")
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert not service.engine.jobs
    for other in ("application/json; charset=utf-8", "application/vnd.calotype+json"):
        headers = {"content-type": other}
        answer = await service.stub.client.post(url, content=json.dumps({"prompt": "a"}), headers=headers)
        assert answer.status_code == 200


async def test_every_route_of_the_api_is_tested(service: Service) -> None:
    """The table of this module has every path of the OpenAPI document."""
    paths = (await service.stub.client.get(f"http://{service.address}/openapi.json")).json()["paths"]
    names = {"{generation_id}": "ID", "{token}": "TOKEN", "{sequence}": "0", "{model}": "fake"}
    for path in paths:
        for name, value in names.items():
            path = path.replace(name, value)
        assert f"/v1{path}" in ROUTES
