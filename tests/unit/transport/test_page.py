"""The page as served by the web port."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from calotype_server.auth.access import Access
from calotype_server.transport.web.server import PAGE, WebServer
from support.grpcweb import Connection


@pytest.fixture
async def address():
    """The address of a web port with the built page and without a service."""

    async def ready() -> bool:
        return True

    server = WebServer("127.0.0.1:0", lambda _: None, Access(), is_ready=ready)
    yield await server.start()
    await server.stop(0)


async def get(address: str, path: str):
    """Returns status, headers and body."""
    connection = await Connection.open(address)
    try:
        await connection.request("GET", path, {"host": address})
        response, body = await connection.answer("GET")
    finally:
        connection.close()
    return response.status_code, {name.decode(): value.decode() for name, value in response.headers}, body


def linked(html: str) -> list[str]:
    """Returns the URLs that a document loads."""
    found = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.extend(value for name, value in attrs if name in ("src", "href"))

    Parser().feed(html)
    return found


async def test_the_page_and_its_resources_are_served(address):
    """All resources of the document are served from the same origin."""
    status, headers, body = await get(address, "/")
    assert status == 200
    assert headers["content-type"].startswith("text/html")
    links = linked(body.decode())
    assert len(links) >= 3
    for link in links:
        assert link.startswith("./")
        assert (await get(address, link[1:]))[0] == 200
    for sheet in PAGE.glob("assets/*.css"):
        assert "//" not in re.sub(r"/\*.*?\*/", "", sheet.read_text(encoding="utf-8"), flags=re.DOTALL)


async def test_the_page_needs_no_inline_script_or_style(address):
    """The content security policy allows neither, and the document contains neither."""
    _, headers, body = await get(address, "/")
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert not re.search(rb"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", body)


async def test_only_files_with_a_content_hash_are_cached(address):
    """Browsers revalidate the document, cache its assets permanently, and do not cache errors."""
    _, document, body = await get(address, "/")
    assert document["cache-control"] == "no-cache"
    asset = next(link for link in linked(body.decode()) if link.startswith("./assets/"))
    assert "immutable" in (await get(address, asset[1:]))[1]["cache-control"]
    status, missing, _ = await get(address, "/assets/missing.js")
    assert status == 404
    assert "immutable" not in missing.get("cache-control", "")


@pytest.mark.parametrize("path", ["/../pyproject.toml", "/%2e%2e/settings.py", "/assets/%2e%2e/%2e%2e/settings.py"])
async def test_paths_cannot_leave_the_page_folder(address, path):
    """A path with parent folders does not return files outside of the page folder."""
    status, _, body = await get(address, path)
    assert status in (400, 404)
    assert b"CALOTYPE_" not in body
