"""The OpenAPI document is valid and complete, and the server handles requests that match or violate it."""

from __future__ import annotations

import asyncio
import os
import re
import threading
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import requests
import schemathesis
import schemathesis.specs.openapi.schemas  # imported now, before other threads run
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from calotype.v1 import calotype_pb2 as pb
from support.engine.fake_engine import FakeEngine
from support.service import running

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLES = int(os.environ.get("SCHEMATHESIS", "10"))
"""Number of requests for each operation and mode."""

CHECKS = {
    # Some requests do not reach the API, because no route matches their path.
    GenerationMode.NEGATIVE: [not_a_server_error, unsupported_method],
    GenerationMode.POSITIVE: [
        not_a_server_error,
        unsupported_method,
        status_code_conformance,
        content_type_conformance,
        response_schema_conformance,
    ],
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The URL of a server in its own thread, for blocking clients."""
    ready = threading.Event()
    found: dict[str, Any] = {}

    async def serve() -> None:
        stop = asyncio.Event()
        async with running(FakeEngine(), transport="sse") as service:
            found.update(url=f"http://{service.address}", loop=asyncio.get_running_loop(), stop=stop)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(30)
    yield found["url"]
    found["loop"].call_soon_threadsafe(found["stop"].set)
    thread.join(30)


@pytest.fixture(scope="module")
def document(url: str) -> dict[str, Any]:
    """The served document."""
    return httpx.get(f"{url}/openapi.json").json()


@pytest.fixture
def session() -> Iterator[requests.Session]:
    """An HTTP session that is closed after the test."""
    with requests.Session() as session:
        yield session


@pytest.fixture(scope="module")
def described(url: str) -> Any:
    """The document as loaded by schemathesis."""
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


@pytest.mark.timeout(120 * EXAMPLES)
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_responses_match_the_document_for_any_request(
    described: Any, session: requests.Session, mode: GenerationMode
) -> None:
    """Valid and invalid requests get no 5xx, and every response is one that the document describes."""
    for operation in (found.ok() for found in described.get_all_operations()):
        if mode is GenerationMode.NEGATIVE and operation.path in ("/model", "/models"):
            continue  # these take no input that could be invalid

        @given(operation.as_strategy(generation_mode=mode))
        @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
        def send(case: Any) -> None:
            case.call_and_validate(session=session, checks=CHECKS[mode], timeout=20)

        send()


def test_the_document_describes_the_proto(document: dict[str, Any]) -> None:
    """The document is OpenAPI 3.1, and its schemas have every field of the messages with the proto's comments."""
    assert document["openapi"].startswith("3.1")
    for message in (pb.GenerateRequest, pb.Progress, pb.Model, pb.GenerationSummary):
        described = document["components"]["schemas"][message.DESCRIPTOR.name]["properties"]
        assert {field.name for field in message.DESCRIPTOR.fields} <= set(described)
        assert all("description" in each for each in described.values())
    seed = document["components"]["schemas"]["GenerateRequest"]["properties"]["seed"]
    assert seed["description"].startswith("Seed of the initial noise, 0 to 9007199254740991")


def test_every_reference_resolves(document: dict[str, Any], url: str) -> None:
    """References in the document and on its page resolve; the page has no scripts and no external resources."""
    schemas = document["components"]["schemas"]
    assert set(re.findall(r'"#/components/schemas/([^"]+)"', httpx.get(f"{url}/openapi.json").text)) <= set(schemas)
    page = httpx.get(f"{url}/docs")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert set(re.findall(r'href="#([^"]+)"', page.text)) <= set(re.findall(r'id="([^"]+)"', page.text))
    assert set(re.findall(r'(?:src|href)="([^#"][^"]*)"', page.text)) == {"/docs.css", "/openapi.json"}
    assert "<script" not in page.text
    assert httpx.get(f"{url}/docs.css").headers["content-type"].startswith("text/css")
    for path, methods in document["paths"].items():
        for method in methods:
            assert f"{method.upper()} /v1{path}" in page.text
