"""TLS and mTLS on every port: who is let in, and certificates that change while the server runs."""

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
from support.service import open_channel, running

if TYPE_CHECKING:
    from pathlib import Path


async def get_model(address: str, transport: str, authority: Authority | None, *, shown: bool = True) -> pb.Model:
    """Asks for the model on a connection of its own; raises what the connection fails with."""
    if transport != "native":
        context = authority and authority.context(shown=shown)
        channel = WebChannel(address, text=transport == "grpc-web-text", context=context)
        try:
            return await GenerationServiceStub(channel).GetModel(pb.GetModelRequest())
        finally:
            channel.close()
    async with open_channel(address, authority, shown=shown) as channel:
        return await GenerationServiceStub(channel).GetModel(pb.GetModelRequest())


async def is_turned_away(address: str, transport: str, authority: Authority | None, *, shown: bool = True) -> None:
    """Fails unless the connection itself comes to nothing, which is no status of the server's."""
    with pytest.raises((grpc.aio.AioRpcError, OSError, h11.RemoteProtocolError)) as caught:
        await get_model(address, transport, authority, shown=shown)
    if isinstance(caught.value, grpc.aio.AioRpcError):
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "grpc-status-details-bin" not in dict(caught.value.trailing_metadata() or ())


async def test_a_generation_streams_over_tls(transport: str, tmp_path: Path) -> None:
    """Everything that works in the clear works encrypted, up to the final image."""
    async with running(FakeEngine(), authority=Authority(tmp_path), transport=transport) as service:
        messages = [message async for message in service.stub.Generate(pb.GenerateRequest(prompt="a cat"))]
        assert messages[-1].phase == pb.PHASE_SUCCEEDED
        assert messages[-1].image


async def test_who_speaks_no_tls_or_trusts_another_authority_gets_nowhere(grpc_transport: str, tmp_path: Path) -> None:
    """Neither plaintext nor a certificate of a stranger makes a connection, and others are not disturbed."""
    (tmp_path / "other").mkdir()
    authority, other = Authority(tmp_path), Authority(tmp_path / "other")
    async with running(FakeEngine(), authority=authority, transport=grpc_transport) as service:
        await is_turned_away(service.address, grpc_transport, None)
        await is_turned_away(service.address, grpc_transport, other)
        assert (await get_model(service.address, grpc_transport, authority)).name == "fake"


async def test_mutual_tls_asks_for_a_certificate_of_our_authority(grpc_transport: str, tmp_path: Path) -> None:
    """With it a client is let in; without one, or with a stranger's, it is not."""
    (tmp_path / "other").mkdir()
    authority, other = Authority(tmp_path, mutual=True), Authority(tmp_path / "other", mutual=True)
    async with running(FakeEngine(), authority=authority, transport=grpc_transport) as service:
        assert (await get_model(service.address, grpc_transport, authority)).name == "fake"
        await is_turned_away(service.address, grpc_transport, authority, shown=False)
        other._root = authority._root  # trusts the server, and shows what another authority has signed
        await is_turned_away(service.address, grpc_transport, other)


async def test_a_new_certificate_counts_for_new_connections(grpc_transport: str, tmp_path: Path) -> None:
    """After a swap, new connections see the new certificate, and a stream under way goes on."""
    (tmp_path / "old").mkdir()
    authority, old = Authority(tmp_path), Authority(tmp_path / "old")
    old._root = authority._root
    engine = FakeEngine()
    engine.hold()
    certificates = authority.certificates()
    authority.certificates = lambda: certificates
    async with running(engine, authority=authority, transport=grpc_transport) as service:
        watched = FileWatcher(certificates.files, certificates.reload)
        call = service.stub.Generate(pb.GenerateRequest(prompt="a cat"))
        assert (await call.read()).phase == pb.PHASE_QUEUED
        authority.renew()
        await asyncio.to_thread(watched.check)
        assert (await get_model(service.address, grpc_transport, authority)).name == "fake"
        await is_turned_away(service.address, grpc_transport, old)
        engine.allow()
        while (message := await call.read()) is not grpc.aio.EOF:
            last = message
        assert last.phase == pb.PHASE_SUCCEEDED


async def test_a_swap_that_is_half_done_leaves_the_old_certificate(grpc_transport: str, tmp_path: Path) -> None:
    """A key without its certificate, or a file that is gone, is not taken up; when both are there, they are."""
    authority = Authority(tmp_path)
    certificates = authority.certificates()
    authority.certificates = lambda: certificates
    async with running(FakeEngine(), authority=authority, transport=grpc_transport) as service:
        watched = FileWatcher(certificates.files, certificates.reload)
        whole = authority.certificate.read_bytes()
        for broken in (b"", b"no certificate", whole[:200]):
            authority.certificate.write_bytes(broken)
            watched.check()
            assert (await get_model(service.address, grpc_transport, authority)).name == "fake"
        authority.issue()
        fresh = authority.certificate.read_bytes()
        authority.certificate.write_bytes(whole)
        watched.check()
        assert (await get_model(service.address, grpc_transport, authority)).name == "fake"
        authority.certificate.write_bytes(fresh)
        watched.check()
        assert (await get_model(service.address, grpc_transport, authority)).name == "fake"
        if grpc_transport != "native":
            first = fresh.decode().partition("-----END")[0] + "-----END CERTIFICATE-----"
            assert await peer_certificate(service.address, authority) == ssl.PEM_cert_to_DER_cert(first)


async def test_handshakes_are_bounded_in_time_and_number(tmp_path: Path) -> None:
    """Who connects and says nothing is closed in time, one too many at once, and then there is room again."""
    authority, limits = Authority(tmp_path), PortLimits(request_seconds=1.0, max_connections=2)
    async with running(FakeEngine(), authority=authority, transport="grpc-web", ports=limits) as service:
        silent = [await Connection.open(service.address) for _ in range(3)]
        # The third has no room; the others have a second.
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.wait_for(silent[2].reader.read(), 20) == b""
        for connection in silent[:2]:
            with contextlib.suppress(ConnectionResetError):
                assert await asyncio.wait_for(connection.reader.read(), 20) == b""
        for connection in silent:
            connection.close()
        assert (await get_model(service.address, "grpc-web", authority)).name == "fake"


async def peer_certificate(address: str, authority: Authority) -> bytes:
    """The certificate that a port shows, DER."""
    connection = await Connection.open(address, authority.context())
    try:
        return connection.writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    finally:
        connection.close()


@pytest.mark.parametrize("name", ["certificate", "key", "ca"])
@pytest.mark.parametrize("content", [None, b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_broken_files_are_named(name: str, content: bytes | None, tmp_path: Path) -> None:
    """A file that is missing, empty or damaged is a StartupError that names it, and no traceback."""
    authority = Authority(tmp_path, mutual=True)
    path = getattr(authority, name)
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(CertificatesUnusable, match=path.name):
        authority.certificates()


def test_a_key_of_another_certificate_is_refused(tmp_path: Path) -> None:
    """Two files that are each fine and do not belong together are a StartupError that names both."""
    (tmp_path / "other").mkdir()
    authority, other = Authority(tmp_path), Authority(tmp_path / "other")
    authority.key.write_bytes(other.key.read_bytes())
    with pytest.raises(CertificatesUnusable, match=r"server\.pem.*server\.key"):
        authority.certificates()


async def test_browsers_that_came_over_tls_stay_with_it(tmp_path: Path) -> None:
    """Every answer over TLS has HSTS, refusals too; none on localhost, where other things are developed."""
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
