"""Addresses and encryption."""

import asyncio
import shutil
import subprocess

import grpc
import pytest

from calotype import TLS, AsyncClient, Client, Unavailable
from calotype._testing.servicer import Servicer
from calotype.targets import parse_address
from calotype.testing import FakeServer


@pytest.mark.parametrize(
    ("address", "target"),
    [
        ("localhost:50051", "localhost:50051"),
        ("example.com", "example.com:50051"),
        ("[::1]:8080", "[::1]:8080"),
        ("[::1]", "[::1]:50051"),
        ("::1", "[::1]:50051"),
        ("dns:///example.com:443", "dns:///example.com:443"),
        ("unix:/run/calotype.sock", "unix:/run/calotype.sock"),
    ],
)
def test_addresses(address, target):
    """Hosts, ports and gRPC targets are valid addresses."""
    assert parse_address(address) == target


@pytest.mark.parametrize(
    "address", ["", "a b:1", "http://localhost:50051", "host:0", "host:port", "host:65536", ":1", 7]
)
def test_malformed_address_raises(address):
    """Both clients reject a malformed address when they are made."""
    for kind in (Client, AsyncClient):
        with pytest.raises(ValueError, match="Expected"):
            kind(address)


def test_key_and_certificate_go_together():
    """A private key without a certificate raises ValueError."""
    with pytest.raises(ValueError, match="go together"):
        TLS(private_key=b"key")


def test_private_key_is_not_printed():
    """repr() of TLS omits the private key."""
    assert "secret" not in repr(TLS(private_key=b"secret", certificate_chain=b"chain"))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
async def test_encrypted_connection(tmp_path, serve):
    """Both clients trust the given authority and no other."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command = ["openssl", "req", "-x509", *curve, *name, "-days", "1", "-keyout", key, "-out", certificate]
    await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
    with serve(Servicer(FakeServer()._state), credentials) as address:
        tls = TLS(root_certificates=certificate.read_bytes())
        with Client(address, tls=tls) as client:
            assert client.generate("a red apple").result().format == "png"
        async with AsyncClient(address, tls=tls) as client:
            assert (await client.generate("a red apple").result()).format == "png"
        with Client(address, tls=True) as stranger, pytest.raises(Unavailable):
            stranger.model()
