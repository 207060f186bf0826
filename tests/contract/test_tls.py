"""TLS and mTLS on every port, and certificates that change while the server runs."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import TYPE_CHECKING

import grpc
import h11
import pytest

from calotype.v1 import calotype_pb2 as pb
from calotype.v1.calotype_pb2_grpc import GenerationServiceStub
from calotype_server.errors import CertificatesUnusable
from calotype_server.file_watcher import FileWatcher
from calotype_server.limits import PortLimits
from support.authority import Authority
from support.engine.fake_engine import FakeEngine
from support.grpcweb import Connection, WebChannel, header_dict
from support.keyring import notice_change
from support.service import open_channel, running

if TYPE_CHECKING:
    from pathlib import Path


async def get_model(address: str, transport: str, authority: Authority | None, *, shown: bool = True) -> pb.Model:
    """Calls GetModel on a new connection. Raises the error of a failed connection."""
    if transport != "native":
        context = authority.context(shown=shown) if authority else None
        channel = WebChannel(address, text=transport == "grpc-web-text", context=context)
        try:
            return await channel.stub().GetModel(pb.GetModelRequest())
        finally:
            channel.close()
    async with open_channel(address, authority, shown=shown) as channel:
        return await GenerationServiceStub(channel).GetModel(pb.GetModelRequest())


async def fails_to_connect(address: str, transport: str, authority: Authority | None, *, shown: bool = True) -> None:
    """Fails unless the connection itself fails, as opposed to a call that gets a status from the server."""
    with pytest.raises((grpc.aio.AioRpcError, OSError, h11.RemoteProtocolError)) as caught:
        await get_model(address, transport, authority, shown=shown)
    if isinstance(caught.value, grpc.aio.AioRpcError):
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "grpc-status-details-bin" not in dict(caught.value.trailing_metadata() or ())


async def test_a_generation_streams_over_tls(transport: str, tmp_path: Path) -> None:
    """A generation over TLS streams up to its final image."""
    async with running(FakeEngine(), authority=Authority(tmp_path), transport=transport) as service:
        messages = [message async for message in service.stub.Generate(pb.GenerateRequest(prompt="a cat"))]
        assert messages[-1].phase == pb.PHASE_SUCCEEDED
        assert messages[-1].image


async def test_plaintext_and_untrusted_certificates_fail(grpc_transport: str, tmp_path: Path) -> None:
    """Clients that use plaintext or trust another authority cannot connect; other clients can."""
    (tmp_path / "other").mkdir()
    authority, other = Authority(tmp_path), Authority(tmp_path / "other")
    async with running(FakeEngine(), authority=authority, transport=grpc_transport) as service:
        await fails_to_connect(service.address, grpc_transport, None)
        await fails_to_connect(service.address, grpc_transport, other)
        assert (await get_model(service.address, grpc_transport, authority)).name == "fake"


async def test_mutual_tls_requires_a_certificate_of_the_configured_authority(
    grpc_transport: str, tmp_path: Path
) -> None:
    """Clients without a certificate, or with one of another authority, cannot connect."""
    (tmp_path / "other").mkdir()
    authority, other = Authority(tmp_path, mutual=True), Authority(tmp_path / "other", mutual=True)
    async with running(FakeEngine(), authority=authority, transport=grpc_transport) as service:
        assert (await get_model(service.address, grpc_transport, authority)).name == "fake"
        await fails_to_connect(service.address, grpc_transport, authority, shown=False)
        other._root = authority._root  # trusts the server, and sends a certificate of another authority
        await fails_to_connect(service.address, grpc_transport, other)


async def test_a_new_certificate_applies_to_new_connections(grpc_transport: str, tmp_path: Path) -> None:
    """After a reload, new connections use the new certificate, and an active stream continues."""
    (tmp_path / "old").mkdir()
    authority, old = Authority(tmp_path), Authority(tmp_path / "old")
    old._root = authority._root
    engine = FakeEngine()
    engine.hold()
    certificates = authority.certificates()
    authority.certificates = lambda: certificates
    async with running(engine, authority=authority, transport=grpc_transport) as service:
        watcher = FileWatcher(certificates.files, certificates.reload)
        call = service.stub.Generate(pb.GenerateRequest(prompt="a cat"))
        assert (await call.read()).phase == pb.PHASE_QUEUED
        authority.renew()
        notice_change(watcher)
        assert (await get_model(service.address, grpc_transport, authority)).name == "fake"
        await fails_to_connect(service.address, grpc_transport, old)
        engine.allow()
        while (message := await call.read()) is not grpc.aio.EOF:
            last = message
        assert last.phase == pb.PHASE_SUCCEEDED


async def test_an_incomplete_replacement_keeps_the_old_certificate(grpc_transport: str, tmp_path: Path) -> None:
    """A damaged certificate, or one that does not match the key, is not loaded; a complete pair is."""
    authority = Authority(tmp_path)
    certificates = authority.certificates()
    authority.certificates = lambda: certificates
    async with running(FakeEngine(), authority=authority, transport=grpc_transport) as service:
        watcher = FileWatcher(certificates.files, certificates.reload)
        whole = authority.certificate.read_bytes()
        for broken in (b"", b"no certificate", whole[:200]):
            authority.certificate.write_bytes(broken)
            notice_change(watcher)
            assert (await get_model(service.address, grpc_transport, authority)).name == "fake"
        authority.issue()
        fresh = authority.certificate.read_bytes()
        authority.certificate.write_bytes(whole)
        notice_change(watcher)
        assert (await get_model(service.address, grpc_transport, authority)).name == "fake"
        authority.certificate.write_bytes(fresh)
        notice_change(watcher)
        assert (await get_model(service.address, grpc_transport, authority)).name == "fake"
        if grpc_transport != "native":
            first = fresh.decode().partition("-----END")[0] + "-----END CERTIFICATE-----"
            assert await peer_certificate(service.address, authority) == ssl.PEM_cert_to_DER_cert(first)


async def test_handshakes_are_limited_in_time_and_number(tmp_path: Path) -> None:
    """A silent connection closes after the timeout, an excess one at once; then new ones are accepted."""
    authority, limits = Authority(tmp_path), PortLimits(request_seconds=1.0, max_connections=2)
    async with running(FakeEngine(), authority=authority, transport="grpc-web", ports=limits) as service:
        silent = [await Connection.open(service.address) for _ in range(3)]
        # The third exceeds the limit; the others have one second.
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.wait_for(silent[2].reader.read(), 20) == b""
        for connection in silent[:2]:
            with contextlib.suppress(ConnectionResetError):
                assert await asyncio.wait_for(connection.reader.read(), 20) == b""
        for connection in silent:
            connection.close()
        assert (await get_model(service.address, "grpc-web", authority)).name == "fake"


async def peer_certificate(address: str, authority: Authority) -> bytes:
    """Returns the certificate that a port sends, DER."""
    connection = await Connection.open(address, authority.context())
    try:
        return connection.writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    finally:
        connection.close()


@pytest.mark.parametrize("name", ["certificate", "key", "ca"])
@pytest.mark.parametrize("content", [None, b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_errors_name_the_unusable_file(name: str, content: bytes | None, tmp_path: Path) -> None:
    """A missing, empty or damaged file is a CertificatesUnusable error that names it."""
    authority = Authority(tmp_path, mutual=True)
    path = getattr(authority, name)
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(CertificatesUnusable, match=path.name):
        authority.certificates()


def test_a_key_of_another_certificate_is_rejected(tmp_path: Path) -> None:
    """A certificate and a key that are valid but do not match are an error that names both."""
    (tmp_path / "other").mkdir()
    authority, other = Authority(tmp_path), Authority(tmp_path / "other")
    authority.key.write_bytes(other.key.read_bytes())
    with pytest.raises(CertificatesUnusable, match=r"server\.pem.*server\.key"):
        authority.certificates()


async def test_responses_over_tls_have_hsts(tmp_path: Path) -> None:
    """Every response over TLS has HSTS, even rejections, except on localhost, where it would affect other servers."""
    authority = Authority(tmp_path)
    async with running(FakeEngine(), authority=authority, transport="grpc-web") as service:
        for path, host, expected in (
            ("/", service.address, "max-age=31536000"),
            ("/healthz", service.address, "max-age=31536000"),
            ("/healthz", "evil.example", "max-age=31536000"),
            ("/healthz", "localhost", None),
        ):
            connection = await Connection.open(service.address, authority.context())
            await connection.request("GET", path, {"host": host})
            head, _ = await connection.answer("GET")
            connection.close()
            assert header_dict(head).get("strict-transport-security") == expected, (path, host)
